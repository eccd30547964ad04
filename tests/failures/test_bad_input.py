"""What users get wrong most: every message names the field, the value, what is allowed and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from guilomo.cli import main
from tiny_runs import colour_rows, run_of, write_recipe, write_rows


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


ROWS = colour_rows(30, "train")
FILES: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["source = '", "rows.jsonl'", "expected an existing file or folder", "Give a file"]),
    "empty": (b"", ["rows.jsonl is empty", "expected one JSON object per line"]),
    "mis-encoded": (
        "é".join(json.dumps(row) + "\n" for row in ROWS).encode("latin1"),
        ["rows.jsonl is not UTF-8", "line 1", "byte 0xe9", "Convert it, for example: iconv"],
    ),
    "one row": (jsonl(ROWS[:1]), ["rows.jsonl holds 1 row", "expected at least 2", "Check the path"]),
    "one class": (
        jsonl([{**row, "label": 0, "answer": "red"} for row in ROWS]),
        ["classes among the training rows = 'red'", "expected at least two classes", "Use more or other rows"],
    ),
    "label out of range": (
        jsonl([*ROWS[:4], {**ROWS[4], "label": 2}]),
        ["rows.jsonl, line 5: label = 2", "expected an integer from 0 to 1", "Labels are indices that start at 0"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, colour_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, says = FILES[case]
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    refused(colour_recipe(task={"source": str(path)}, methods=["lora"]), says, tmp_path, capsys)


OPTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "targets that match nothing": (
        {"mixture": {"target_modules": ["qeury"]}},
        ["target_modules", "qeury", "query"],
    ),
    "fewer experts than top-k": (
        {"search": {"max_experts": 1}},
        ["max_experts = 1 is below", "top_k = 2", "Raise", "lower"],
    ),
    "a budget below one rank-1 expert": (
        {"methods": ["guilomo"], "budget": {"parameters": 100}},
        ["budget = 100", "expected 2688 to 29120", "from the fewest experts at rank 1", "Change the budget"],
    ),
    "the same for LoRA": (
        {"methods": ["lora"], "budget": {"parameters": 100}},
        ["budget = 100", "expected at least 896", "Raise the budget"],
    ),
    "an unknown key": (
        {"search": {"stpes": 3}},
        ["search.stpes is not a known key", "expected one of batch_size", "Did you mean 'steps'?"],
    ),
    "contradictory top-k": (
        {"search": {"top_k": 3}},
        ["search.top_k = 3 contradicts mixture.top_k = 2", "Set the latter"],
    ),
    "contradictory task and evaluation": (
        {"evaluation": {"generate": True}},
        [
            "evaluation.generate = True contradicts task.kind = 'classification'",
            "only causal_lm",
            "Set one or the other",
        ],
    ),
    "no room for an outer step": (
        {"search": {"warmup_steps": 6}},
        ["warmup_steps = 6 leaves no outer step in steps = 6", "Lower warmup_steps"],
    ),
    "a number out of range": (
        {"train": {"learning_rate": -1}},
        ["train.learning_rate = -1", "should be greater than 0"],
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, colour_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, says = OPTIONS[case]
    refused(colour_recipe(**changes), says, tmp_path, capsys)


def test_ids_that_repeat_across_splits_are_warned_of(colour_recipe: Any, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", colour_rows(30, "train"))
    test = [{**row, "id": f"train-{i}"} for i, row in enumerate(colour_rows(5, "test"))]
    content = colour_recipe(task={"source": str(train), "test_source": str(write_rows(tmp_path / "test.jsonl", test))})
    with pytest.warns(UserWarning, match=r"5 example ids occur more than once.*'train-0'.*Give each row its own"):
        assert len(run_of(content).task.test) == 5


def refused(content: dict[str, Any], says: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 2 and one message that has all the words."""
    capsys.readouterr()
    assert main(["run", str(write_recipe(folder / "recipe.yaml", content)), "--quiet"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("error: ")
    assert "Traceback" not in printed
    for words in says:
        assert words in printed
