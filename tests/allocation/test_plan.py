from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guilomo.allocation import Allocation, ModulePlan, ModuleShape, linear_router, no_router, uniform
from guilomo.errors import GuilomoError


@pytest.fixture
def plan() -> Allocation:
    modules = {
        "layer.0.query": ModulePlan(6, 10, (3, 1, 2), top_k=2),
        "layer.0.key": ModulePlan(6, 10),
        "layer.1.query": ModulePlan(6, 10, (4,), top_k=1),
        "layer.1.key": ModulePlan(6, 10, (4, 4)),
    }
    return Allocation(modules, scaling="alpha_over_sqrt_r", alpha=8, strategy="by hand: ünïcode")


def test_a_plan_survives_json_files_pickling_and_copying(plan: Allocation, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert Allocation.load(tmp_path / "plan.json") == plan
    assert Allocation.from_json(plan.to_json()) == plan
    assert Allocation.from_json(plan.to_json()).to_json() == plan.to_json()
    assert Allocation.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert copy.deepcopy(plan) == plan
    assert list(Allocation.from_json(plan.to_json()).modules) == list(plan.modules)


def test_a_plan_cannot_be_changed(plan: Allocation) -> None:
    with pytest.raises(TypeError):
        plan.modules["layer.0.key"] = ModulePlan(6, 10, (1, 1))  # type: ignore[index]
    with pytest.raises(AttributeError):
        plan.alpha = 1.0  # type: ignore[misc]


def test_a_plan_does_not_follow_the_dict_it_was_made_from() -> None:
    modules = {"a": ModulePlan(2, 2)}
    plan = Allocation(modules)
    modules.clear()
    assert list(plan.modules) == ["a"]


def test_counts_of_a_module_follow_the_formulas() -> None:
    plan = Allocation({"a": ModulePlan(6, 10, (3, 1, 2), top_k=2), "b": ModulePlan(6, 10)})
    experts, router = 6 * 16, 3 * 6
    assert plan.parameters() == experts + router
    assert plan.parameters(no_router) == experts
    assert plan.parameters(lambda count, features: linear_router(count, features) + count) == experts + router + 3
    assert plan.active_parameters() == pytest.approx(experts * 2 / 3 + router)
    assert plan.flops_per_token() == 2 * (experts + router)
    assert list(plan.adapted()) == ["a"]


def test_one_expert_has_no_router() -> None:
    plan = Allocation({"a": ModulePlan(6, 10, (4,), top_k=1)})
    assert plan.parameters() == plan.active_parameters() == 4 * 16


def test_mola_prints_these_numbers(llama: dict[str, ModuleShape]) -> None:
    assert uniform(llama, experts=5, rank=8).parameters() == 105_635_840
    assert uniform(llama, experts=8, rank=8).parameters() == 169_017_344
    assert uniform(llama, experts=5, rank=8).parameters(no_router) == 99_942_400
    assert uniform(llama, experts=4, rank=8).parameters() == 84_508_672


def test_every_expert_is_scaled_by_its_own_rank(plan: Allocation) -> None:
    assert plan.scales("layer.0.query") == pytest.approx((8 / 3**0.5, 8.0, 8 / 2**0.5))
    assert plan.scales("layer.0.key") == ()
    module = {"a": ModulePlan(6, 10, (4, 1))}
    assert Allocation(module, alpha=16).scales("a") == (4.0, 16.0)
    assert Allocation(module, scaling="constant", alpha=16).scales("a") == (16.0, 16.0)


def test_numpy_integers_become_python_integers() -> None:
    plan = ModulePlan(np.int64(6), 10, tuple(np.array([1, 2])), np.int32(1))  # type: ignore[arg-type]
    assert plan == ModulePlan(6, 10, (1, 2), 1)
    assert json.dumps([plan.in_features, *plan.ranks])


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"ranks": (4, 0)}, ["rank = 0", "at least 1", "empty"]),
        ({"ranks": (True,)}, ["rank = True"]),
        ({"ranks": (1.5, 2)}, ["rank = 1.5"]),
        ({"ranks": 8}, ["ranks = 8", "one rank per expert"]),
        ({"ranks": (8,)}, ["top_k = 2", "expert count, 1", "Lower top_k"]),
        ({"top_k": 0}, ["top_k = 0"]),
        ({"in_features": 0}, ["in_features = 0"]),
    ],
)
def test_errors_of_a_module_name_field_value_and_remedy(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(GuilomoError) as error:
        ModulePlan(**{"in_features": 6, "out_features": 10, **fields})
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"scaling": "alpha_over_sqr_r"}, ["scaling", "Did you mean 'alpha_over_sqrt_r'"]),
        ({"alpha": 0}, ["alpha = 0", "above 0"]),
        ({"alpha": float("nan")}, ["alpha = nan"]),
        ({"modules": {"a": (8, 8)}}, ["module 'a'", "ModulePlan"]),
        ({"modules": {"": ModulePlan(2, 2)}}, ["module name = ''"]),
        ({"modules": [1]}, ["modules = [1]"]),
        ({"strategy": 3}, ["strategy = 3"]),
    ],
)
def test_errors_of_a_plan_name_field_value_and_remedy(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(GuilomoError) as error:
        Allocation(**{"modules": {}, **fields})
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"modules": {}, "alfa": 3}', ["'alfa'", "Did you mean 'alpha'"]),
        ('{"alpha": 3}', ["modules", "Add 'modules'"]),
        ('{"modules": {}, "version": 2}', ["version = 2", "Update guilomo"]),
        ('{"modules": []}', ["modules = []"]),
        ('{"modules": {"a.q": {"in_features": 2, "out_features": 2, "rank": [1]}}}', ["a.q", "mean 'ranks'"]),
        ('{"modules": {"a.q": {"in_features": 2, "ranks": [1]}}}', ["a.q", "Add 'out_features'"]),
        ('{"modules": {"a.q": {"in_features": 2, "out_features": 2, "ranks": [1, 0]}}}', ["a.q", "rank = 0"]),
        ('{"modules": {"a.q": {"in_features": 2, "out_features": 2, "ranks": 8}}}', ["ranks of module 'a.q'"]),
        ('{"modules": {"a.q": 4}}', ["a.q", "in_features"]),
        ('{"modules": {"a": {}, "a": {}}}', ["key = 'a'", "once"]),
        ("[1]", ["not a JSON object"]),
        ("{", ["not a JSON object"]),
    ],
)
def test_reading_is_strict(text: str, parts: list[str]) -> None:
    with pytest.raises(GuilomoError) as error:
        Allocation.from_json(text)
    assert all(part in str(error.value) for part in parts)


def test_loading_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(GuilomoError, match=r"broken\.json"):
        Allocation.load(tmp_path / "broken.json")


def test_a_wrong_module_name_proposes_the_nearest(plan: Allocation) -> None:
    with pytest.raises(GuilomoError, match=r"Did you mean 'layer\.0\.query'"):
        plan["layer.0.quary"]


def test_a_plan_is_checked_against_a_model(plan: Allocation) -> None:
    plan.check_against(plan.shapes(), budget=plan.parameters())
    lacking = {name: shape for name, shape in plan.shapes().items() if name != "layer.0.key"}
    with pytest.raises(GuilomoError, match=r"'layer\.0\.key'.*Did you mean"):
        plan.check_against(lacking)
    with pytest.raises(GuilomoError, match=r"'head'.*Add 'head'"):
        plan.check_against({**plan.shapes(), "head": (6, 2)})
    with pytest.raises(GuilomoError, match=r"'layer\.1\.key' = \(6, 10\).*\(6, 12\)"):
        plan.check_against({**plan.shapes(), "layer.1.key": (6, 12)})
    with pytest.raises(GuilomoError, match=r"at most the budget.*Raise the budget"):
        plan.check_against(plan.shapes(), budget=plan.parameters() - 1)


def test_differences_show_what_changed(plan: Allocation) -> None:
    changed = {**plan.modules, "layer.0.key": ModulePlan(6, 10, (8, 8)), "head": ModulePlan(6, 2)}
    del changed["layer.1.query"]
    other = Allocation(changed)
    assert plan.diff(plan) == []
    assert plan.describe_diff(plan) == "no differences"
    assert [change.module for change in plan.diff(other)] == ["layer.0.key", "layer.1.query", "head"]
    assert plan.describe_diff(other).splitlines() == [
        "layer.0.key: not adapted -> 2×8 top 2",
        "layer.1.query: 1×4 top 1 -> absent",
        "head: absent -> not adapted",
    ]


def test_the_table_is_aligned_and_adds_up(plan: Allocation) -> None:
    lines = plan.table().splitlines()
    assert len(lines) == 1 + len(plan.modules) + 1
    assert len({len(line) for line in lines}) == 1
    assert "3,1,2" in lines[1]
    assert "2×4" in lines[4]
    assert f"{plan.parameters():,}" in lines[-1]
    assert plan.rows()[2] == {
        "module": "layer.1.query",
        "layer": 1,
        "projection": "query",
        "experts": 1,
        "ranks": (4,),
        "top_k": 1,
        "parameters": 64,
        "active_parameters": 64.0,
    }


def test_an_empty_plan_prints() -> None:
    assert Allocation({}).table()
    assert Allocation.from_json(Allocation({}).to_json()) == Allocation({})
