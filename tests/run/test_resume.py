"""Stopping and continuing a run: the same numbers as without a stop, and nothing done twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guilomo.errors import GuilomoError
from guilomo.run.files import read_json
from guilomo.training import Interrupted
from tiny_runs import StopAfter, recipe, run_of, without_times


def stopped(content: dict[str, Any], stage: str, steps: int) -> None:
    job = run_of(content, StopAfter(stage, steps))
    job.prepare(resume=True)
    with pytest.raises(Interrupted):
        job.all()


@pytest.fixture(scope="module")
def whole(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of `colour_recipe` without a stop."""
    task = {"kind": "classification", "source": str(colours), "name": "colours"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guilomo.run.pipeline.write_report", lambda results, path: None)
        results = run_of(recipe(bert_folder, task, tmp_path_factory.mktemp("whole"))).all()
    found: dict[str, Any] = without_times(results)
    return found


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_a_search_continues_to_the_same_numbers(colour_recipe: Any, whole: dict[str, Any], steps: int) -> None:
    stopped(colour_recipe("cut"), "search", steps)
    results = read_json(Path(colour_recipe("cut")["output"]) / "results.json")
    assert results["status"] == "partial"
    assert results["search"] is None
    assert results["methods"] == []
    job = run_of(colour_recipe("cut"))
    job.prepare(resume=True)
    assert without_times(job.all()) == whole


@pytest.mark.parametrize(("stage", "steps"), [("guilomo seed 0", 1), ("guilomo seed 0", 4), ("lora seed 0", 3)])
def test_a_training_continues_to_the_same_numbers(
    colour_recipe: Any, whole: dict[str, Any], stage: str, steps: int
) -> None:
    stopped(colour_recipe("cut"), stage, steps)
    folder = Path(colour_recipe("cut")["output"])
    results = read_json(folder / "results.json")
    assert results["status"] == "partial"
    assert (folder / "report.html").exists()
    assert sum(len(m["runs"]) for m in results["methods"]) == (1 if stage.startswith("lora") else 0)
    assert results["methods"][0]["allocation"]
    assert without_times(run_of(colour_recipe("cut")).all()) == whole


@pytest.mark.slow
def test_several_stops_in_one_training(colour_recipe: Any, whole: dict[str, Any]) -> None:
    for _ in range(2):
        stopped(colour_recipe("cut"), "guilomo seed 0", 2)
    assert without_times(run_of(colour_recipe("cut")).all()) == whole


def test_a_crash_between_training_and_scoring_keeps_the_training(
    colour_recipe: Any, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run_of(colour_recipe("cut"))
    with monkeypatch.context() as patch:
        patch.setattr("guilomo.run.pipeline.evaluate", lambda *a, **k: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            job.all()
    seen: list[str] = []
    job = run_of(colour_recipe("cut"), progress=lambda stage, step, steps, text: seen.append(stage))
    assert without_times(job.all()) == whole
    assert "search" not in seen
    assert "guilomo seed 0" not in seen


@pytest.mark.slow
def test_dropout_and_accumulation_continue_too(colour_recipe: Any) -> None:
    changes = {"mixture": {"dropout": 0.2}, "train": {"accumulation": 2, "batch_size": 4}, "methods": ["guilomo"]}
    whole = without_times(run_of(colour_recipe("whole", **changes)).all())
    stopped(colour_recipe("cut", **changes), "search", 3)
    stopped(colour_recipe("cut", **changes), "guilomo seed 0", 3)
    assert without_times(run_of(colour_recipe("cut", **changes)).all()) == whole


def test_language_models_continue_too(text_recipe: Any) -> None:
    changes = {"methods": ["guilomo"], "train": {"start_from_search": True}}
    whole = without_times(run_of(text_recipe("causal_lm", "whole", **changes)).all())
    stopped(text_recipe("causal_lm", "cut", **changes), "search", 4)
    stopped(text_recipe("causal_lm", "cut", **changes), "guilomo seed 0", 3)
    assert without_times(run_of(text_recipe("causal_lm", "cut", **changes)).all()) == whole


def test_finished_stages_are_not_done_again(colour_recipe: Any) -> None:
    first = run_of(colour_recipe()).all()
    seen: list[str] = []
    again = run_of(colour_recipe(), progress=lambda stage, *rest: seen.append(stage))
    again.prepare(resume=True)
    assert {**again.all(), "created": first["created"]} == first
    assert seen == []


def test_a_folder_with_a_run_is_only_continued_when_asked(colour_recipe: Any) -> None:
    job = run_of(colour_recipe(methods=["lora"]))
    job.prepare(resume=False)
    job.all()
    with pytest.raises(GuilomoError, match="--resume"):
        run_of(colour_recipe(methods=["lora"])).prepare(resume=False)
    run_of(colour_recipe(methods=["lora"])).prepare(resume=True)
    other = run_of(colour_recipe(methods=["lora"], train={"learning_rate": 0.5}))
    with pytest.raises(GuilomoError, match=r"train\.learning_rate: 0\.001 there, 0\.5 now"):
        other.prepare(resume=True)


def test_a_run_that_made_nothing_claims_nothing(colour_recipe: Any) -> None:
    job = run_of(colour_recipe(methods=["lora"], task={"name": "colors"}))
    job.prepare(resume=False)
    with pytest.raises(GuilomoError):
        job.all()
    run_of(colour_recipe(methods=["lora"])).prepare(resume=False)


def test_data_that_changed_are_noticed(colour_recipe: Any, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    original = Path(colour_recipe()["task"]["source"])
    for name in ("colours.train.jsonl", "colours.test.jsonl"):
        (source / name).write_text((original / name).read_text())
    run_of(colour_recipe(methods=["lora"], task={"source": str(source)})).all()
    test = source / "colours.test.jsonl"
    test.write_text("".join(test.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(GuilomoError, match="have changed since"):
        run_of(colour_recipe(methods=["lora"], task={"source": str(source)})).all()


@pytest.mark.parametrize("stop", [None, ("search", 5), ("lora seed 0", 3)])
def test_nothing_is_continued_on_other_rows(colour_recipe: Any, tmp_path: Path, stop: tuple[str, int] | None) -> None:
    """A finished search, a stopped search and a stopped training all belong to the rows they saw."""
    source = tmp_path / "data"
    source.mkdir()
    original = Path(colour_recipe()["task"]["source"])
    for name in ("colours.train.jsonl", "colours.test.jsonl"):
        (source / name).write_text((original / name).read_text())
    methods = ["lora"] if stop and stop[0] != "search" else ["guilomo"]
    content = colour_recipe(methods=methods, task={"source": str(source)})
    if stop is None:
        run_of(content).search()
    else:
        stopped(content, *stop)
    train = source / "colours.train.jsonl"
    train.write_text(train.read_text().replace("the train thing", "a train thing"))
    with pytest.raises(GuilomoError, match=r"have changed since|data_hash"):
        run_of(content).all()


def test_a_damaged_result_says_what_to_do(colour_recipe: Any) -> None:
    job = run_of(colour_recipe(methods=["lora"]))
    job.all()
    (job.config.folder / "methods" / "lora" / "seed-0" / "result.json").write_text("{")
    with pytest.raises(GuilomoError, match=r"damaged.*Delete it"):
        run_of(colour_recipe(methods=["lora"])).all()
