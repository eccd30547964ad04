"""A whole comparison: every cell, what it may say, how it continues, and what a failure costs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from comparisons import Finished, comparison, finish, job_of, numbers
from guilomo.compare import CompareConfig
from guilomo.compare.cells import Board, State
from guilomo.errors import GuilomoError
from guilomo.evaluation import holm
from guilomo.run import Run, RunConfig
from guilomo.run.files import read_json, write_json
from guilomo.training import Interrupted
from tiny_runs import StopAfter


def entry(results: dict[str, Any], method: str, task: str) -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in results["methods"] if m["name"] == method)["tasks"][task]
    return found


def test_every_cell_is_done(finished: Finished) -> None:
    results = finished.results
    assert results == read_json(finished.job.results_file)
    assert results["status"] == "complete"
    assert results["failures"] == []
    cells = [c for m in results["methods"] for t in m["tasks"].values() for c in t["cells"]]
    assert len(cells) == 2 * 3 * 2
    for cell in cells:
        folder = finished.job.config.folder / cell["folder"]
        found = read_json(folder / "result.json")
        assert cell["value"] == found["metrics"]["accuracy"]["value"]
        origin = read_json(folder / "cell.json")
        assert origin["seed"] == cell["seed"] == found["seed"]
        assert origin["data_hash"] == found["data_hash"]
        assert origin["versions"]["torch"]
        assert origin["hardware"]["cores"]


def test_all_methods_have_one_budget_and_effort(finished: Finished) -> None:
    for task in finished.results["tasks"]:
        assert task["budget"] > 0
        for method in ("guilomo", "lora", "uniform"):
            found = entry(finished.results, method, task["name"])
            assert 0.9 * task["budget"] < found["parameters"] <= task["budget"]
            assert [rate["learning_rate"] for rate in found["sweep"]["rates"]] == [1e-3, 1e-2]
            assert found["sweep"]["seed"] == 3


def test_a_task_is_the_run_that_guilomo_run_would_make(finished: Finished, tmp_path: Path) -> None:
    """The same numbers, to the last bit, for a cell with a sweep and one that follows from it."""
    config = finished.job.board.runs["few"]
    alone = Run(RunConfig.model_validate({**config.model_dump(), "output": str(tmp_path), "methods": ["lora"]}))
    assert alone.config.train.max_steps == 4
    for seed in config.seeds:
        found = read_json(config.folder / "methods" / "lora" / f"seed-{seed}" / "result.json")
        again = alone.train(alone.config.methods[0], seed)
        assert again["rows"] == found["rows"]
        assert [list(point) for point in again["loss_curve"]] == [list(point) for point in found["loss_curve"]]


def test_means_and_ranks_are_those_of_the_cells(finished: Finished) -> None:
    results = finished.results
    for task in ("all", "few"):
        means = {}
        for method in results["methods"]:
            found = method["tasks"][task]
            means[method["name"]] = found["mean"]
            assert found["mean"] == pytest.approx(np.mean([cell["value"] for cell in found["cells"]]))
            assert found["low"] <= found["mean"] <= found["high"]
        wanted = dict(zip(means, stats.rankdata([-m for m in means.values()]), strict=True))
        assert {name: entry(results, name, task)["rank"] for name in means} == wanted
    for method in results["methods"]:
        ranks = [method["tasks"][t["name"]]["rank"] for t in results["tasks"] if t["above_chance"] is not False]
        assert method["mean_rank"] == (pytest.approx(np.mean(ranks)) if ranks else None)


def test_every_method_is_tested_against_plain_lora(finished: Finished) -> None:
    tests = finished.results["tests"]
    assert {(t["task"], t["method"], t["metric"]) for t in tests} == {
        (task, method, metric)
        for task in ("all", "few")
        for method in ("guilomo", "uniform")
        for metric in ("accuracy", "loss")
    }
    assert [t["p_corrected"] for t in tests] == holm([t["p"] for t in tests])
    for test in tests:
        losses = {}
        for method in (test["method"], "lora"):
            seeds = finished.job.board.runs[test["task"]].folder / "methods" / method
            rows = [read_json(seeds / f"seed-{seed}" / "result.json")["rows"] for seed in (3, 1)]
            values = [row["hits"]["accuracy"] if test["metric"] == "accuracy" else row["row_loss"] for row in rows]
            losses[method] = np.array(values, dtype=float)
        assert test["difference"] == pytest.approx((losses[test["method"]] - losses["lora"]).mean())


def test_options_are_tested_per_character_where_that_is_the_metric(
    llama_folder: Path, colours: Path, tmp_path: Path
) -> None:
    metric = "accuracy_per_character"
    few: dict[str, Any] = {"methods": ["lora", "uniform"], "sweep": {}, "measure_costs": False}
    content = comparison(llama_folder, colours, tmp_path / "out", evaluation={"metric": metric}, **few)
    content["tasks"] = [{**content["tasks"][1], "kind": "causal_lm"}]
    results = finish(content).results
    right, loss = results["tests"]
    assert (right["metric"], loss["metric"]) == (metric, "loss")
    lora, uniform = (entry(results, method, "few") for method in few["methods"])
    assert right["difference"] == pytest.approx(uniform["mean"] - lora["mean"])


def test_costs_are_ratios_to_plain_lora(finished: Finished) -> None:
    for task in ("all", "few"):
        plain = entry(finished.results, "lora", task)
        assert plain["step_time_ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert plain["peak_bytes_ratio"] == 1.0
        for method in ("guilomo", "uniform"):
            found = entry(finished.results, method, task)
            ratio = found["step_time_ratio"]
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
            assert 0.5 < found["peak_bytes_ratio"] < 5


def test_a_finished_comparison_is_only_shown(finished: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.job.config.folder.rglob("result.json")}
    with pytest.raises(GuilomoError, match="--resume"):
        job_of(finished.content).prepare(resume=False)
    again = finish(finished.content, resume=True)
    assert {**again.results, "created": finished.results["created"]} == finished.results
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = {**finished.content, "seeds": [4, 3]}
    with pytest.raises(GuilomoError, match=r"other settings \(first seed: 3 there, 4 now"):
        job_of(other).prepare(resume=True)


def stopped(content: dict[str, Any], stage: str, steps: int) -> None:
    """Begins a comparison and stops it at a step of a stage."""
    job = job_of(content, StopAfter(stage, steps))
    job.prepare(resume=False)
    with pytest.raises(Interrupted):
        job.run()
    partial = read_json(job.results_file)
    assert partial["status"] == "partial"
    assert any("provisional" in sentence for sentence in partial["verdict"])


def test_a_stopped_sweep_continues_to_the_same_numbers(
    finished: Finished, bert_folder: Path, colours: Path, tmp_path: Path
) -> None:
    """Of two methods on one task: fewer trainings than below, and no search."""
    content = comparison(bert_folder, colours, tmp_path / "out", methods=["lora", "uniform"], measure_costs=False)
    content["tasks"] = content["tasks"][1:]
    stopped(content, "few: lora lr 0.01", 2)
    results = finish(content, resume=True).results
    assert results["status"] == "complete"
    for method in ("lora", "uniform"):
        found, wanted = (numbers(entry(r, method, "few")) for r in (results, finished.results))
        assert (found["cells"], found["sweep"]) == (wanted["cells"], wanted["sweep"])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "steps"), [("all: lora lr 0.01", 2), ("few: search", 2), ("few: uniform seed 1", 3)])
def test_a_stopped_comparison_continues_to_the_same_numbers(
    finished: Finished, bert_folder: Path, colours: Path, tmp_path: Path, stage: str, steps: int
) -> None:
    content = comparison(bert_folder, colours, tmp_path / "out", measure_costs=False)
    stopped(content, stage, steps)
    results = finish(content, resume=True).results
    wanted = {**numbers(finished.results), "config": numbers(results)["config"]}
    assert numbers(results) == wanted


BROKEN = {"name": "broken", "strategy": "uniform", "options": {"experts": 0}}


def test_a_failure_leaves_the_other_cells(finished: Finished, bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    methods = [BROKEN, "lora"]
    content = comparison(bert_folder, colours, tmp_path / "out", methods=methods, measure_costs=False)
    found = finish(content)
    results, board = found.results, found.job.board
    assert results["status"] == "partial"
    assert len(results["failures"]) == 4
    states = {cell: board.state(cell) for cell in board.cells if cell.method == "broken"}
    assert {cell.seed: state for cell, state in states.items()} == {3: State.FAILED, 1: State.BLOCKED}
    assert all("not run, for" in f["error"] for f in results["failures"] if f["seed"] == 1)
    assert entry(results, "broken", "all")["mean"] is None
    assert entry(results, "broken", "all")["cells"][0]["status"] == "failed"
    assert any("4 cells failed" in sentence for sentence in results["verdict"])
    for task in ("all", "few"):
        values = [[c["value"] for c in entry(r, "lora", task)["cells"]] for r in (results, finished.results)]
        assert values[0] == values[1]


def test_failures_are_tried_again_when_asked(bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"methods": ["lora"], "seeds": [0], "sweep": {"learning_rates": []}}
    content = comparison(bert_folder, colours, tmp_path / "out", **options, measure_costs=False)
    board = Board(CompareConfig.model_validate(content))
    lost = board.cells[0]
    write_json(board.error(lost), {"error": "the power went", "traceback": []})
    found = finish(content, resume=True)
    assert [f["error"] for f in found.results["failures"]] == ["the power went"]
    job = job_of(content)
    job.prepare(resume=True, retry_failed=True)
    assert job.run()["status"] == "complete"


def test_a_search_that_failed_blocks_what_needs_it(bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    board = Board(CompareConfig.model_validate(comparison(bert_folder, colours, tmp_path / "out")))
    search = next(cell for cell in board.cells if cell.method is None)
    needing = [cell for cell in board.cells if cell.method == "guilomo" and cell.task == search.task]
    assert {board.state(cell) for cell in needing} == {State.WAITING}
    write_json(board.error(search), {"error": "no luck", "traceback": []})
    assert {board.state(cell) for cell in needing} == {State.BLOCKED}
    assert all("no luck" in str(board.reason(cell)) for cell in needing)
    others = [cell for cell in board.cells if cell.method == "lora" and cell.seed == 3]
    assert {board.state(cell) for cell in others} == {State.READY}


def test_data_that_changed_are_noticed(bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    source = shutil.copytree(colours, tmp_path / "data")
    options: dict[str, Any] = {"methods": ["lora"], "seeds": [0], "sweep": {"learning_rates": []}}
    content = comparison(bert_folder, source, tmp_path / "out", **options, measure_costs=False)
    job_of(content).prepare(resume=False)
    rows = source / "colours.test.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(GuilomoError, match="have changed since"):
        job_of(content).prepare(resume=True)


def test_methods_that_are_not_known_stop_it_at_once(bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(GuilomoError, match="Did you mean 'uniform'"):
        job_of(comparison(bert_folder, colours, tmp_path, methods=["unifrom"]))


def test_data_that_cannot_be_used_stop_it_before_anything_is_trained(
    bert_folder: Path, colours: Path, tmp_path: Path
) -> None:
    content = comparison(bert_folder, colours, tmp_path / "out", tasks=[{"name": "nowhere", "source": str(colours)}])
    with pytest.raises(GuilomoError, match="nowhere"):
        job_of(content).prepare(resume=False)
