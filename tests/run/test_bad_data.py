"""Bad data, budgets, targets and models, through the whole stack: an error that says what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guilomo.cli import main
from guilomo.errors import GuilomoError
from tiny_runs import colour_rows, run_of, write_recipe, write_rows


def _rows(count: int = 30, **changes: Any) -> list[dict[str, Any]]:
    return [{**row, **changes} for row in colour_rows(count, "train")]


ROWS: dict[str, tuple[Any, str]] = {
    "one class": (_rows(label=0, answer="red"), "at least two classes"),
    "label out of range": (_rows(label=2), "an integer from 0 to 1"),
    "unlabelled": (_rows(label=-1), "-1 marks an unlabelled row"),
    "no rows": ([], "empty"),
    "one row": (_rows(1), "at least 2"),
    "other fields": ([{"text": "a"}] * 9, "missing fields"),
    "free answers": ([{**r, "type": "gen", "choices": None, "label": None} for r in _rows()], "kind: causal_lm"),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_rows(colour_recipe: Any, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows, says = ROWS[case]
    source = write_rows(tmp_path / "bad.jsonl", rows)
    content = colour_recipe(task={"source": str(source)}, methods=["lora"])
    with pytest.raises(GuilomoError, match=says):
        run_of(content).all()
    _cli_says(content, tmp_path, says, capsys)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"task": {"source": "/nowhere/x.jsonl"}}, "existing file or folder"),
    "no such task": ({"task": {"name": "colors"}}, r"colours\.train\.jsonl"),
    "no variable": ({"task": {"source": "$GUILOMO_NOT_SET/x"}}, "export GUILOMO_NOT_SET"),
    "no held-out rows": ({"task": {"held_out_fraction": 0.0}}, "Raise held_out_fraction"),
    "budget too small": ({"budget": {"parameters": 100}}, "budget"),
    "budget too large": ({"budget": {"parameters": 10**7}}, "max_experts = 5 and max_rank = 6 can spend"),
    "no target": ({"mixture": {"target_modules": ["qeury"]}}, "query"),
    "no model": ({"model": {"path": "/nowhere/model"}}, r"model\.path = '/nowhere/model' cannot be loaded"),
    "no device": ({"model": {"device": "cuda:77"}}, r"model\.device = 'cuda:77'"),
    "strange device": ({"model": {"device": "tpv"}}, r"model\.device = 'tpv'"),
    "unknown option": ({"methods": [{"name": "mola", "options": {"group": [2]}}]}, "Did you mean 'groups'"),
    "text for classes": ({"task": {"kind": "lm", "source": "docstrings"}}, "a text for kind 'lm'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_run(colour_recipe: Any, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, says = BROKEN[case]
    content = colour_recipe(**changes)
    with pytest.raises(GuilomoError, match=says):
        run_of(content).all()
    _cli_says(content, tmp_path, says, capsys)


def test_a_model_folder_without_a_tokenizer(colour_recipe: Any, tmp_path: Path, bert_folder: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((bert_folder / name).read_bytes())
    with pytest.raises(GuilomoError, match=r"model\.path"):
        run_of(colour_recipe(model={"path": str(bare)})).all()


def test_a_training_that_diverges_stops_at_once(colour_recipe: Any) -> None:
    train = {"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 50}
    with pytest.raises(GuilomoError, match=r"training loss was nan at step \d\b.*Lower train\.learning_rate"):
        run_of(colour_recipe(methods=["lora"], train=train)).all()


def _cli_says(content: dict[str, Any], folder: Path, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    path = write_recipe(folder / "recipe.yaml", {**content, "output": str(folder / "other")})
    assert main(["run", str(path), "--quiet"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("error")
    assert "Traceback" not in printed
