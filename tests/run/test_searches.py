"""One search per training seed: folders, seeds, agreement; and how far a search of a run moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy.stats import spearmanr

from guilomo.allocation import Allocation, ModulePlan
from guilomo.allocation.costs import linear_router
from guilomo.cli import main
from guilomo.report import render
from guilomo.run.files import read_json
from guilomo.run.searches import agreement
from guilomo.training import Interrupted
from tiny_runs import StopAfter, quicken_page, run_of, without_times, write_recipe

FAST = {"search": {"seed": 10, "outer_learning_rate": 3.0}}


def test_every_seed_has_its_search(colour_recipe: Any) -> None:
    job = run_of(colour_recipe(methods=["guilomo"], seeds=[3, 4], search_per_seed=True, **FAST))
    results = job.all()
    folder, search = job.config.folder, results["search"]
    assert [(s["seed"], s["search_seed"]) for s in search["searches"]] == [(3, 13), (4, 14)]
    plans = [Allocation.load(folder / "search" / f"seed-{seed}" / "allocation.json") for seed in (3, 4)]
    assert plans[0] != plans[1]
    assert [s["allocation"] for s in search["searches"]] == [plan.to_dict() for plan in plans]
    for seed, plan in zip((3, 4), plans, strict=True):
        assert Allocation.load(folder / "methods" / "guilomo" / f"seed-{seed}" / "allocation.json") == plan
    assert results["methods"][0]["allocation"] == plans[0].to_dict()
    assert search["agreement"] == agreement(plans, job.router_cost)
    assert results["seconds"]["search"] == pytest.approx(sum(s["seconds"] for s in search["searches"]), abs=0.06)
    first = read_json(folder / "search" / "seed-3" / "search.json")
    assert {k: v for k, v in search.items() if k not in ("searches", "agreement")} == first
    assert "Every training seed has a search of its own, 2 so far" in render(results)


def test_a_search_for_a_seed_is_that_of_its_own_search_seed(colour_recipe: Any) -> None:
    one = run_of(colour_recipe("one", methods=["guilomo"], search_per_seed=True, search={"seed": 10}))
    other = run_of(colour_recipe("other", methods=["guilomo"], search={"seed": 14}))
    assert one.search(4) == other.search()
    assert (other.config.folder / "search" / "allocation.json").exists()


def test_searches_per_seed_continue_to_the_same_numbers(colour_recipe: Any) -> None:
    changes = {"methods": ["guilomo"], "seeds": [0, 1], "search_per_seed": True}
    changes["train"] = {"start_from_search": True}
    whole = without_times(run_of(colour_recipe("whole", **changes)).all())
    with pytest.raises(Interrupted):
        run_of(colour_recipe("cut", **changes), StopAfter("search seed 1", 4)).all()
    part = read_json(Path(colour_recipe("cut")["output"]) / "results.json")["search"]
    assert [s["seed"] for s in part["searches"]] == [0]
    assert part["agreement"] is None
    assert without_times(run_of(colour_recipe("cut", **changes)).all()) == whole


def _plan(*ranks: int) -> Allocation:
    return Allocation({f"layer.{i}": ModulePlan(8, 8, (rank,) * 2, 2) for i, rank in enumerate(ranks)})


def test_agreement_is_the_mean_rank_correlation_over_pairs() -> None:
    plans = [_plan(1, 2, 3, 4), _plan(2, 4, 6, 8), _plan(4, 3, 2, 1)]
    assert agreement(plans[:2], linear_router) == pytest.approx(1)
    assert agreement(plans, linear_router) == pytest.approx((1 - 1 - 1) / 3)
    ties = [_plan(1, 1, 2, 5), _plan(3, 1, 2, 2)]
    assert agreement(ties, linear_router) == pytest.approx(spearmanr([1, 1, 2, 5], [3, 1, 2, 2]).statistic)
    assert agreement(plans[:1], linear_router) is None
    assert agreement([plans[0], _plan(2, 2, 2, 2)], linear_router) is None


@pytest.mark.parametrize("rate", [1e-9, 3.0])
def test_the_run_says_how_far_the_search_moved(
    colour_recipe: Any,
    tmp_path: Path,
    rate: float,
    capsys: pytest.CaptureFixture[str],
    real_page: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = colour_recipe(methods=["guilomo"], search={"outer_learning_rate": rate})
    path = str(write_recipe(tmp_path / "r.yaml", content))
    assert main(["search", path]) == 0
    printed = capsys.readouterr().out
    assert "search: 6/6" in printed
    assert "moved experts by" in printed
    moved = read_json(Path(content["output"]) / "search" / "search.json")["moved"]
    still = rate < 1
    assert f"on average (at most {moved['experts']['max']:.2f})" in printed
    assert ("The search barely moved" in printed) == still
    assert (moved["warning"] is not None) == still
    assert ("The search barely moved" in (Path(content["output"]) / "report.html").read_text()) == still
    quicken_page(monkeypatch)
    assert main(["run", path, "--resume", "--quiet"]) == 0
    assert ("The search barely moved" in capsys.readouterr().out) == still


def test_the_search_command_makes_every_search(colour_recipe: Any, tmp_path: Path, capsys: Any) -> None:
    content = colour_recipe(methods=["guilomo"], seeds=[0, 1], search_per_seed=True)
    assert main(["search", str(write_recipe(tmp_path / "r.yaml", content)), "--quiet"]) == 0
    printed = capsys.readouterr().out
    for seed in (0, 1):
        assert str(Path(content["output"]) / "search" / f"seed-{seed}" / "allocation.json") in printed
    assert main(["run", str(tmp_path / "r.yaml"), "--dry-run", "--quiet"]) == 0
    assert "2 searches, one per seed" in capsys.readouterr().out
