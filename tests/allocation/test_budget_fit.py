from __future__ import annotations

import random
from itertools import pairwise

import pytest

from guilomo.allocation import Allocation, ModuleShape, Preference, fit, no_router, same_budget, uniform
from guilomo.allocation.rounding import apportion, half_up, spread_order
from guilomo.errors import GuilomoError

Shapes = dict[str, ModuleShape]


def random_task(seed: int) -> tuple[Preference, Shapes, random.Random]:
    """A preference over a small model with mixed sizes; every second time some modules are not adapted."""
    draw = random.Random(seed)
    sizes = (16, 64, 384, 1536)
    names = [f"h.{layer}.{name}" for layer in range(draw.randint(1, 6)) for name in "abc"[: draw.randint(1, 3)]]
    shapes = {name: ModuleShape(draw.choice(sizes), draw.choice(sizes)) for name in names}
    drop = seed % 2 * 0.4
    wishes = {name: 0.0 if draw.random() < drop else draw.uniform(0.2, 9.0) for name in names}
    wishes[names[0]] = 3.3
    ranks = {name: tuple(draw.uniform(0.1, 20.0) for _ in range(draw.randint(1, 8))) for name in names}
    return Preference(wishes, ranks), shapes, draw


def row(plan: Allocation) -> int:
    """Parameters of the cheapest rank row."""
    return min(sum(module.shape) for module in plan.adapted().values())


@pytest.mark.parametrize("floor", [True, False])
def test_budgets_are_met_and_never_overrun(floor: bool) -> None:
    for seed in range(150):
        preference, shapes, draw = random_task(seed)
        top_k = draw.randint(1, 3)
        smallest = fit(preference, shapes, top_k=top_k, top_k_floor=floor, max_rank=1, max_experts=top_k)
        budget = int(smallest.parameters() * draw.uniform(1.0, 40.0))
        plan = fit(preference, shapes, top_k=top_k, top_k_floor=floor, budget=budget)
        assert plan.parameters() <= budget
        assert plan.parameters() > budget - row(plan)
        for name, module in plan.modules.items():
            assert module.adapted == (preference.experts[name] > 0)
            assert module.top_k == min(top_k, module.experts) or not module.adapted
            assert not floor or not module.adapted or module.experts >= top_k


def test_caps_hold_and_counts_grow_when_ranks_cannot() -> None:
    for seed in range(150):
        preference, shapes, draw = random_task(seed)
        max_rank, max_experts = draw.choice([2, 4, 8]), draw.choice([10, 16])
        kept = {name: shape for name, shape in shapes.items() if preference.experts[name] > 0}
        wished = fit(preference, shapes, max_rank=1).parameters()
        budget = draw.randint(wished, uniform(kept, experts=max_experts, rank=max_rank).parameters())
        plan = fit(preference, shapes, budget=budget, max_rank=max_rank, max_experts=max_experts)
        assert plan.parameters() <= budget
        free = [sum(module.shape) for module in plan.adapted().values() if min(module.ranks) < max_rank]
        assert budget - plan.parameters() < max(min(free, default=0), 0.01 * budget, row(plan))
        assert max(max(module.ranks) for module in plan.adapted().values()) <= max_rank
        assert max(module.experts for module in plan.modules.values()) <= max_experts


def test_without_a_budget_every_wish_is_rounded() -> None:
    shapes = {"a": ModuleShape(4, 4), "b": ModuleShape(4, 4), "c": ModuleShape(4, 4)}
    wish = Preference({"a": 2.5, "b": 0.4, "c": -1.0}, {"a": (1.5, 0.2), "b": (7.6,)})
    plan = fit(wish, shapes)
    assert plan["a"].ranks == (2, 1, 1)
    assert plan["b"].ranks == (8, 8)
    assert not plan["c"].adapted
    assert list(plan.modules) == ["a", "b", "c"]
    assert fit(wish, shapes, top_k_floor=False)["b"].ranks == (8,)
    assert fit(wish, shapes, max_experts=2, max_rank=3)["a"].ranks == (2, 1)


def test_the_budget_of_a_plan_gives_the_plan_back(shapes: Shapes) -> None:
    for experts, rank in [(2, 1), (4, 8), (5, 7), (8, 3)]:
        plan = uniform(shapes, experts, rank)
        assert uniform(shapes, experts, rank, budget=plan).modules == plan.modules
        assert uniform(shapes, experts, 50, budget=same_budget(plan)).modules == plan.modules


def test_mixed_ranks_come_back_too() -> None:
    for seed in range(40):
        preference, shapes, _ = random_task(seed)
        whole = {name: tuple(float(half_up(rank) + 1) for rank in ranks) for name, ranks in preference.ranks.items()}
        plan = fit(Preference(preference.experts, whole), shapes)
        assert fit(Preference(preference.experts, whole), shapes, budget=plan).modules == plan.modules


def test_the_order_of_the_modules_does_not_matter() -> None:
    for seed in range(20):
        preference, shapes, _ = random_task(seed)
        turned = dict(reversed(shapes.items()))
        assert fit(preference, shapes, budget=500_000).modules == fit(preference, turned, budget=500_000).modules


def test_leftover_rows_spread_over_the_depth(llama: Shapes) -> None:
    base = uniform(llama, experts=4, rank=8)
    plan = uniform(llama, experts=4, rank=8, budget=int(base.parameters() * 1.06))
    extra = [sum(plan[name].rank - 32 for name in llama if f".{layer}." in name) for layer in range(32)]
    assert sum(extra) > 100
    assert max(extra) - min(extra) <= 4


def test_wishes_keep_their_proportions() -> None:
    shapes = {"a": ModuleShape(8, 8), "b": ModuleShape(8, 8)}
    plan = fit(Preference({"a": 2, "b": 2}, {"a": (1.0,), "b": (3.0,)}), shapes, budget=2 * 16 * 80, router=no_router)
    assert [module.ranks for module in plan.modules.values()] == [(20, 20), (60, 60)]


def test_a_budget_below_the_smallest_plan_names_it(minilm: Shapes) -> None:
    smallest = uniform(minilm, experts=2, rank=1).parameters()
    with pytest.raises(GuilomoError, match=rf"budget = 1000 .*at least {smallest} "):
        uniform(minilm, budget=1000)
    assert uniform(minilm, experts=8, budget=smallest).modules == uniform(minilm, experts=2, rank=1).modules


def test_a_tight_budget_takes_experts_away_evenly(minilm: Shapes) -> None:
    budget = uniform(minilm, experts=5, rank=1).parameters() + 20_000
    counts = {module.experts for module in uniform(minilm, experts=8, budget=budget).modules.values()}
    assert counts == {5, 6}


def test_a_budget_that_caps_leave_unused_names_them(minilm: Shapes) -> None:
    wish = Preference(dict.fromkeys(minilm, 4.0), dict.fromkeys(minilm, (8.0,)))
    with pytest.raises(
        GuilomoError, match=r"Raise max_rank \(now 4\) or max_experts \(now 5\).*lower the budget"
    ) as error:
        fit(wish, minilm, budget=10_000_000, max_rank=4, max_experts=5)
    used = uniform(minilm, experts=5, rank=4).parameters()
    assert f"to {used}." in str(error.value)
    assert fit(wish, minilm, budget=used, max_rank=4, max_experts=5).parameters() == used


def test_what_cannot_be_fitted_is_named(minilm: Shapes) -> None:
    wish = Preference(dict.fromkeys(minilm, 4.0), dict.fromkeys(minilm, (8.0,)))
    name = next(iter(minilm))
    with pytest.raises(GuilomoError, match=r"module of the preference = 'encoder\.layer\.0.*Did you mean"):
        fit(wish, {key: shape for key, shape in minilm.items() if key != name})
    with pytest.raises(GuilomoError, match=r"'head'.*Wish for 0 experts"):
        fit(wish, {**minilm, "head": ModuleShape(384, 2)})
    with pytest.raises(GuilomoError, match=r"max_experts = 1 .*at least top_k = 2"):
        fit(wish, minilm, max_experts=1)
    with pytest.raises(GuilomoError, match="budget = 0 "):
        fit(wish, minilm, budget=0)
    with pytest.raises(GuilomoError, match=r"budget = 10\.5 "):
        fit(wish, minilm, budget=10.5)  # type: ignore[arg-type]
    with pytest.raises(GuilomoError, match="no module is adapted"):
        fit(Preference({"a": 0.0}, {}), {"a": ModuleShape(2, 2)}, budget=100)


def test_a_preference_is_checked() -> None:
    with pytest.raises(GuilomoError, match="wished experts of module 'a' = nan"):
        Preference({"a": float("nan")}, {"a": (1.0,)})
    with pytest.raises(GuilomoError, match="wished rank of module 'a' = 0"):
        Preference({"a": 1.0}, {"a": (0.0,)})
    with pytest.raises(GuilomoError, match=r"wished ranks of module 'a' = None.*0 experts"):
        Preference({"a": 1.0}, {})


def test_apportionment_keeps_the_total_and_quota() -> None:
    draw = random.Random(0)
    for _ in range(200):
        weights = [draw.uniform(0.1, 5.0) for _ in range(draw.randint(1, 40))]
        total = draw.randint(1, 300)
        counts = apportion(weights, total)
        assert sum(counts) == total
        assert all(
            abs(count - weight * total / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True)
        )


def test_spread_order_is_a_permutation_without_clusters() -> None:
    order = spread_order(1000)
    assert sorted(order) == list(range(1000))
    tenth = sorted(order[:100])
    assert max(after - before for before, after in pairwise(tenth)) <= 30
