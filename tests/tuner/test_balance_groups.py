"""Which modules are balanced together."""

from __future__ import annotations

from guilomo import Allocation, ModulePlan
from guilomo.tuner.resolve import balance_groups


def plan_of(counts: dict[str, int]) -> Allocation:
    return Allocation({name: ModulePlan(8, 8, (2,) * count, min(2, count)) for name, count in counts.items()})


def test_modules_of_a_layer_share_a_group_where_they_have_as_many_experts() -> None:
    plan = plan_of({"layers.0.q": 2, "layers.0.k": 3, "layers.0.v": 2, "layers.1.q": 2, "pooler": 2})
    assert list(balance_groups(plan, "layer").values()) == [
        ["layers.0.q", "layers.0.v"],
        ["layers.0.k"],
        ["layers.1.q"],
        ["pooler"],
    ]


def test_modules_without_a_router_are_not_balanced() -> None:
    plan = plan_of({"layers.0.q": 1, "layers.0.k": 2})
    assert list(balance_groups(plan, "module").values()) == [["layers.0.k"]]
    assert list(balance_groups(plan, "layer").values()) == [["layers.0.k"]]
