"""Every method of the family: what is listed exists, and a row of it plans, trains, is saved and scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from guilomo.allocation import Allocation, ModulePlan
from guilomo.allocation.registry import STRATEGIES
from guilomo.cli import main
from guilomo.errors import GuilomoError
from guilomo.layers.routers import ROUTERS
from guilomo.methods import METHODS, filled_plan, method_named
from guilomo.methods.fit import more_rank, one_expert_more, with_top_k
from guilomo.methods.method import MATURITIES
from guilomo.run import Run, RunConfig, load_recipe
from guilomo.run.methods import FROM_SEARCH, READY_MADE, attach, router_cost

GROWN = [name for name, method in METHODS.items() if method.grows]


@pytest.fixture
def tiny(colour_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return colour_recipe()


def run_of(recipe: dict[str, Any], *rows: object, **changes: object) -> Run:
    return Run(RunConfig.model_validate({**recipe, "methods": list(rows), **changes}))


def trained_numbers(model: nn.Module) -> int:
    """Without the task's head."""
    names = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return sum(p.numel() for n, p in names if "modules_to_save" not in n and "classifier" not in n)


def test_every_entry_is_whole() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.maturity in MATURITIES
        assert method.maturity == "stable" or method.note, f"{name} does not say what is experimental"
        assert method.summary
        assert method.knobs
        assert bool(method.strategy) + bool(method.grows) + bool(method.starts_from) == 1, name
        assert method.starts_from in ("", *READY_MADE)
    assert {m.strategy for m in METHODS.values()} >= {*STRATEGIES} - {"learned"}
    used = {m.mixture["router"] for m in METHODS.values() if "router" in m.mixture}
    assert used | {"fixed", "topk_of_softmax"} == set(ROUTERS), "a router that no method has"


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(GuilomoError, match=r"method = 'ldmole'.*Did you mean 'ld_mole'"):
        method_named("ldmole")


@pytest.mark.parametrize("name", GROWN)
def test_a_row_spends_the_budget_and_trains_what_it_says(name: str, tiny: dict[str, Any]) -> None:
    run = run_of(tiny, "lora", name, budget={"parameters": 9000})
    (_, method) = run.config.methods
    plan: Allocation = run.facts["plans"][name]
    price = router_cost(run.config, method)
    assert plan.strategy == name
    spent = plan.parameters(price)
    assert spent <= 9000
    dearest = max(m.in_features + (m.experts + 1) * m.out_features for m in plan.adapted().values())
    assert 9000 - spent < 5 * dearest  # less than one more step of a module
    model = attach(run.fresh_model(0), plan, method, run.config, run.task)
    assert isinstance(model, PeftModel)
    assert trained_numbers(model) == spent


@pytest.mark.parametrize("name", GROWN)
def test_a_row_is_trained_scored_and_comes_back(name: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(tiny, name, budget={"parameters": 7000}, output=str(tmp_path / "run"))
    run.prepare(resume=False)
    results = run.all()
    (row,) = results["methods"]
    assert row["summary"]["accuracy"]["seeds"] == 1
    assert row["label"] == METHODS[name].label
    folder = tmp_path / "run" / "methods" / name / "seed-0" / "adapter"
    again = PeftModel.from_pretrained(run.fresh_model(0), str(folder)).eval()
    (method,) = run.config.methods
    assert again.peft_config["default"].router == METHODS[name].mixture["router"]
    batch = run.task.collate(run.task.test[:3])
    with torch.no_grad():
        first, second = again(**batch).logits, again(**batch).logits
    assert torch.equal(first, second)
    assert method.strategy == name


def test_a_row_can_differ_from_its_method(tiny: dict[str, Any]) -> None:
    row = {"name": "ld4", "strategy": "ld_mole", "mixture": {"router_options": {"hidden": 3, "target": 4}}}
    run = run_of(
        tiny, row, {"name": "smora6", "strategy": "smora", "options": {"experts": 6}}, budget={"parameters": 9000}
    )
    assert run.config.mixture_of(run.config.methods[0]).router_options == {"hidden": 3, "target": 4}
    assert min(m.experts for m in run.facts["plans"]["smora6"].adapted().values()) >= 6


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"name": "x", "strategy": "ldmole"}, r"Did you mean 'ld_mole'"),
        ({"name": "smora", "options": {"rank": 3}}, r"option of method 'smora'.*experts"),
        ({"name": "guilomo", "mixture": {"alpha": 3}}, r"the search is common to all"),
        ({"name": "lora", "mixture": {"alpha": 3}}, r"PEFT's LoRA has no mixture"),
        ({"name": "ld_mole", "options": {"budget": 3}}, r"common to all methods|option of method"),
        ({"name": "flylora", "mixture": {"balance_loss": "switch"}}, r"takes no such loss"),
    ],
)
def test_rows_that_make_no_sense(row: object, message: str, tiny: dict[str, Any]) -> None:
    with pytest.raises((GuilomoError, ValueError), match=message):
        run_of(tiny, row)


def test_a_budget_below_the_smallest_plan(tiny: dict[str, Any]) -> None:
    with pytest.raises(GuilomoError, match=r"budget = 100 parameters is not usable: the smallest plan"):
        _ = run_of(tiny, "ld_mole", budget={"parameters": 100}).facts


def least(**modules: ModulePlan) -> Allocation:
    return Allocation(modules, scaling="constant", alpha=6.0)


def test_filling_is_even_and_stops_when_nothing_fits() -> None:
    plan = least(
        a=ModulePlan(10, 10, (1, 1)), b=ModulePlan(10, 10, (1, 1)), c=ModulePlan(30, 30, (1, 1)), d=ModulePlan(5, 5)
    )
    filled = filled_plan(plan, 40 + 40 + 120 + 40 + 40 + 39, lambda experts, features: 0, more_rank)
    assert [filled[n].ranks for n in "abcd"] == [(2, 2), (2, 2), (1, 1), ()]
    filled = filled_plan(plan, 40 + 40 + 120 + 40 + 40 + 40, lambda experts, features: 0, more_rank)
    assert [filled[n].ranks for n in "abcd"] == [(3, 3), (2, 2), (1, 1), ()]


def test_linears_of_a_feed_forward_grow_together() -> None:
    block = {
        "up": ModulePlan(4, 8, (1, 1), role="route", block="m"),
        "down": ModulePlan(8, 4, (1, 1), role="out", block="m"),
    }
    filled = filled_plan(least(**block), 48 + 47, lambda experts, features: 0, more_rank)
    assert filled["up"].ranks == filled["down"].ranks == (1, 1)
    filled = filled_plan(least(**block), 48 + 48, lambda experts, features: 0, more_rank)
    assert filled["up"].ranks == filled["down"].ranks == (2, 2)


def test_chosen_experts_are_a_share() -> None:
    plan = least(a=ModulePlan(10, 10, (1,) * 15, 2), b=ModulePlan(10, 10, (1,) * 17, 2))
    assert one_expert_more(plan["a"]).ranks == (1,) * 16
    by_chosen, by_all = with_top_k(plan, 1 / 4, "chosen"), with_top_k(plan, 1 / 4, "experts")
    assert by_chosen["a"].top_k == by_chosen["b"].top_k == 4
    assert (by_chosen.alpha, by_all.alpha) == (6 / 4, 6 / 16)
    assert with_top_k(plan, 0.01, "")["a"].top_k == 2


def test_the_command_lists_and_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in METHODS)
    assert main(["methods", "smora", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "smora"
    assert found["command"].startswith("guilomo run")
    assert main(["methods", "hydra"]) == 0
    assert "2309.06922" in capsys.readouterr().out
    assert main(["methods", "hidra"]) == 2


@pytest.mark.parametrize("name", [n for n in METHODS if n not in FROM_SEARCH and not METHODS[n].needs])
def test_the_command_that_tries_it_is_a_recipe(name: str) -> None:
    command = METHODS[name].how_to_try.removeprefix("guilomo run ").split(" --set ")
    config = load_recipe(None, [part.removeprefix("--set ") for part in command])
    assert [m.name for m in config.methods] == list(dict.fromkeys(["lora", name]))
