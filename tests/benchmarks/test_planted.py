"""The planted benchmark: its runner on a tiny world, its arithmetic, its page, and (slow) what it is there to show."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.planted import page
from benchmarks.planted.__main__ import main
from benchmarks.planted.summary import summarise
from benchmarks.planted.trial import (
    agreement,
    chance_plan,
    even_plan,
    found_counts,
    planted_plan,
    run_search,
    search_config,
    test_loss,
)
from benchmarks.planted.worlds import NOISE, WORLDS, World, residual_ranks

# pytest would take it for a test of its own.
test_loss.__test__ = False


def tiny(seed: int) -> World:
    """Three layers of width 12, and hardly any steps."""
    world = residual_ranks(seed, ranks=(0, 1, 3), width=12, rows=256)
    options = {"max_rank": 3, "min_experts": 0, "steps": 6, "warmup_steps": 2, "batch_size": 8}
    return dataclasses.replace(world, search=options, train_steps=5)


@pytest.fixture(autouse=True)
def tiny_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORLDS, "tiny", tiny)


def run(*more: str) -> int:
    return main(["--world", "tiny", "--searches", "guilomo", "authors_code", *more])


def without_times(cell: dict[str, Any]) -> dict[str, Any]:
    cell = copy.deepcopy(cell)
    for timed in (cell, *cell["searches"].values()):
        del timed["seconds"]
    return cell


def test_stdout_is_one_json_object_and_a_second_run_gives_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for _ in range(2):
        assert run("--seeds", "2", "--json") == 0
        shown = capsys.readouterr()
        assert "cells: 2/2" in shown.err
        found.append(json.loads(shown.out))
    first, second = found
    assert first["command"].startswith("python -m benchmarks.planted --world tiny")
    assert first["seeds"] == first["summary"]["tiny"]["seeds"] == [0, 1]
    assert first["summary"] == second["summary"]
    assert [without_times(c) for c in first["cells"]] == [without_times(c) for c in second["cells"]]
    assert set(first["cells"][0]["losses"]) == {"guilomo", "authors_code", "planted", "uniform", "random"}


def test_resume_keeps_the_cells_of_the_same_options_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "planted.json"
    assert run("--seeds", "1", "--output", str(path)) == 0
    before = json.loads(path.read_text())
    before["cells"][0]["seconds"] = -1  # no fresh cell has this

    def continued(change: dict[str, Any], *arguments: str) -> list[float]:
        path.write_text(json.dumps({**before, **change}))
        assert main(["--world", "tiny", *arguments, "--output", str(path), "--resume"]) == 0
        return [cell["seconds"] for cell in json.loads(path.read_text())["cells"]]

    both = ("--searches", "guilomo", "authors_code", "--seeds")
    kept, fresh = continued({}, *both, "2")
    assert kept == -1
    assert fresh > 0
    assert continued({}, "--searches", "guilomo", "--seeds", "1") != [-1]
    assert continued({"versions": {**before["versions"], "torch": "0"}}, *both, "1") != [-1]


def test_a_run_that_dies_leaves_its_finished_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(seed: int) -> World:
        if seed == 1:
            raise KeyboardInterrupt
        return tiny(seed)

    monkeypatch.setitem(WORLDS, "tiny", dies)
    path = tmp_path / "planted.json"
    with pytest.raises(KeyboardInterrupt):
        run("--seeds", "3", "--output", str(path))
    assert [cell["seed"] for cell in json.loads(path.read_text())["cells"]] == [0]


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_another_file_is_not_continued(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert run("--output", str(path), "--resume") == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == text


@pytest.mark.parametrize("arguments", [["--resume"], ["--seeds", "0"], ["--jobs", "0"], ["--world", "none"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2


@pytest.mark.parametrize("name", ["residual-ranks", "transformer-ranks", "residual-experts"])
def test_plans_of_a_world_cost_the_same_and_only_the_planted_one_agrees(name: str) -> None:
    world = WORLDS[name](0)
    planted = planted_plan(world)
    assert found_counts(world, planted) == list(world.planted.values())
    assert agreement(world, found_counts(world, planted)) == pytest.approx(1)
    even = even_plan(world)
    assert max(found_counts(world, even)) - min(found_counts(world, even)) <= 1
    for plan in (even, chance_plan(world, 0)):
        assert 0.95 * planted.parameters() <= plan.parameters() <= planted.parameters()


def test_the_planted_plan_can_learn_all_that_was_planted() -> None:
    world = tiny(0)
    world.train_steps, world.search["batch_size"] = 400, 32
    floor = NOISE**2
    assert 0.8 * floor < test_loss(world, planted_plan(world), 0) < 2 * floor
    assert test_loss(world, even_plan(world), 0) > 5 * floor


def test_modules_that_need_nothing_go_unadapted() -> None:
    """With min_experts = 0, layers that were not changed are left without an adapter."""
    world = residual_ranks(0, ranks=(4, 4, 4, 0, 0, 0), width=32, rows=768)
    world.search |= {"max_rank": 8, "steps": 350}
    result = run_search(world, search_config(world, 0, "guilomo"))
    kept = {name for name, plan in result.allocation.modules.items() if plan.adapted}
    assert kept == {name for name, rank in world.planted.items() if rank}
    assert 0.99 * result.budget <= result.allocation.parameters() <= result.budget


def cell(seed: int, spearman: float | None, loss: float, uniform: float) -> dict[str, Any]:
    return {
        "world": "tiny",
        "seed": seed,
        "options": {"searches": {"guilomo": {"max_experts": 1}}},
        "searches": {"guilomo": {"spearman": spearman}},
        "random": {"spearman": 0.4},
        "losses": {"guilomo": loss, "planted": 0.0, "uniform": uniform, "random": 0.5},
    }


def test_summary_over_seeds() -> None:
    found = summarise([cell(0, 1.0, 0.1, 0.3), cell(1, None, 0.2, 0.3)])
    assert found["spearman"]["guilomo"]["value"] == 0.5  # a constant plan agrees with nothing
    assert found["test_loss_minus"]["guilomo"]["uniform"]["value"] == pytest.approx(-0.15)
    # One degree of freedom: t = 12.706, and 0.05 is the standard error.
    assert found["test_loss_minus"]["guilomo"]["uniform"]["high"] == pytest.approx(-0.15 + 12.706 * 0.05, abs=1e-4)
    assert list(found["goals"].values()) == [False, False, False, False]
    better = summarise([cell(seed, 0.95, 0.1, 0.3) for seed in range(2)])
    assert list(better["goals"].values()) == [True, True, True, False]
    alone = summarise([cell(0, 1.0, 0.1, 0.3)])
    assert list(alone["goals"].values()) == [True, False, False, False]


def test_page_is_the_one_the_result_file_gives() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page()


@pytest.mark.slow
def test_the_default_search_finds_planted_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--world", "residual-ranks", "--searches", "guilomo", "--seeds", "1", "--jobs", "2", "--json"]
    assert main(arguments) == 0
    (found,) = json.loads(capsys.readouterr().out)["cells"]
    assert found["searches"]["guilomo"]["spearman"] >= 0.85
    assert found["losses"]["guilomo"] < found["losses"]["uniform"]
    assert found["losses"]["guilomo"] < found["losses"]["random"]
