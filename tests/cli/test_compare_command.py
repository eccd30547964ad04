"""`guilomo compare` as the console script calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from comparisons import comparison
from guilomo.cli import main
from tiny_runs import write_recipe


@pytest.fixture
def path(bert_folder: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One seed, no sweep, few rounds for the costs: seconds."""
    monkeypatch.setattr("guilomo.compare.costs.SECONDS", 0.0)
    content = comparison(
        bert_folder, colours, tmp_path / "out", methods=["uniform"], seeds=[0], sweep={"learning_rates": []}
    )
    return str(write_recipe(tmp_path / "c.yaml", content))


def test_the_table_and_the_verdict_are_printed(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", path]) == 0
    printed = capsys.readouterr().out
    for part in ("Plain LoRA is added", "uniform experts and ranks", "LoRA (PEFT)", "mean rank", "cells: 4/4"):
        assert part in printed
    assert "one training per task" in printed
    assert "compare.json" in printed
    assert main(["compare", path]) == 2
    assert "--resume" in capsys.readouterr().err


def test_json_is_all_that_is_printed(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", path, "--json", "--methods", "lora", "--set", "measure_costs=false"]) == 0
    results: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in results["methods"]] == ["lora"]
    assert results == json.loads((tmp_path / "out" / "compare.json").read_text())


def test_options_replace_keys(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--methods", "lora,uniform", "--seeds", "4", "--budget", "9000", "--set", "measure_costs=false"]
    assert main(["compare", path, "--json", *options, "--set", f"output={tmp_path / 'other'}"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["seeds"] == [4]
    assert {task["budget"] for task in results["tasks"]} == {9000}


def test_a_dry_run_trains_and_writes_nothing(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", path, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for part in ("36 training, 12 held-out, 20 test rows", "11 test rows", "lora: ", "4 cells, 0 of them settled"):
        assert part in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--join"], "--join needs --storage"),
        (["--join", "--storage", "sqlite:///x.db", "--resume"], "--join only does cells"),
        (["--seeds", "a,b"], "--seeds = 'a,b'"),
        (["--workers", "0"], "--workers = 0"),
        (["--set", "metods=[]"], "metods is not a known key"),
    ],
)
def test_bad_options_are_explained(
    path: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", path, *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
