"""Bad data, budgets, targets and models, through the whole stack: an error that says what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

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
    "no such kind of device": ({"model": {"device": "meta"}}, r"model\.device = 'meta'"),
    "options of another type": (
        {"methods": [{"name": "mola", "options": {"groups": 7}}]},
        r"'mola' cannot use its options .*groups=7",
    ),
    "rules without names": ({"methods": [{"name": "rules", "options": {"rules": [1]}}]}, "'rules' cannot use its opt"),
    "alphas as a number": ({"methods": [{"name": "alphalora", "options": {"alphas": 3}}]}, "alphas=3"),
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


@pytest.mark.parametrize("kind", ["lm", "causal_lm"])
def test_an_encoder_is_no_language_model(text_recipe: Any, bert_folder: Path, kind: str) -> None:
    with pytest.raises(GuilomoError, match=r"is an encoder .*use task\.kind: classification, or a decoder model"):
        run_of(text_recipe(kind, model={"path": str(bert_folder)})).fresh_model(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decoder_is_one(text_recipe: Any, dtype: str) -> None:
    assert run_of(text_recipe("lm", model={"dtype": dtype})).facts


def test_a_second_gpu_must_exist(colour_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(GuilomoError, match=r"model\.device = 'cuda:1'"):
        run_of(colour_recipe(model={"device": "cuda:1"})).fresh_model(0)


def _long(split: str) -> list[dict[str, Any]]:
    return [{**row, "input": row["input"] + " very" * 90} for row in colour_rows(12, split)]


def test_rows_longer_than_the_models_positions(colour_recipe: Any, tmp_path: Path) -> None:
    files = {"source": str(write_rows(tmp_path / "long.jsonl", _long("train"))), "test_source": None}
    files["test_source"] = str(write_rows(tmp_path / "test.jsonl", _long("test")))
    says = r"task\.max_length = 200 is above the model's 64 positions and rows of that length exist.*at most 64"
    with pytest.raises(GuilomoError, match=says):
        run_of(colour_recipe(task={**files, "max_length": 200})).fresh_model(0)
    assert run_of(colour_recipe(task={**files, "max_length": 64})).facts
    assert run_of(colour_recipe(task={"max_length": 200})).facts  # the rows themselves are short


def test_roberta_has_fewer_positions_than_its_table(colour_recipe: Any, tmp_path: Path, bert_folder: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = RobertaConfig(**sizes, vocab_size=320, max_position_embeddings=66, pad_token_id=1)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    for file in bert_folder.glob("tokenizer*"):
        (tmp_path / "roberta" / file.name).write_bytes(file.read_bytes())
    source = str(write_rows(tmp_path / "long.jsonl", _long("train")))
    changes = {"model": {"path": str(tmp_path / "roberta")}, "task": {"source": source, "max_length": 66}}
    with pytest.raises(GuilomoError, match="above the model's 64 positions"):
        run_of(colour_recipe(**changes)).fresh_model(0)


def _with_head(bert_folder: Path, folder: Path, labels: int) -> Path:
    """The encoder with a trained head of so many labels."""
    model = BertForSequenceClassification.from_pretrained(bert_folder, num_labels=labels, ignore_mismatched_sizes=True)
    model.classifier.weight.data.fill_(7.0)
    model.save_pretrained(folder)
    for file in bert_folder.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("labels", [2, 5])
def test_the_head_of_a_checkpoint_is_drawn_anew(
    colour_recipe: Any, bert_folder: Path, tmp_path: Path, labels: int
) -> None:
    folder = _with_head(bert_folder, tmp_path / "headed", labels)
    job = run_of(colour_recipe(model={"path": str(folder)}, methods=["lora"]))
    heads: list[Any] = [job.fresh_model(seed).get_parameter("classifier.weight") for seed in (0, 0, 1)]
    assert heads[0].shape == (2, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].abs().max() < 2
    body = "bert.encoder.layer.0.output.dense.weight"
    loaded = BertForSequenceClassification.from_pretrained(folder).get_parameter(body)
    assert torch.equal(job.fresh_model(0).get_parameter(body), loaded)


def test_a_body_of_other_shapes_is_refused(colour_recipe: Any, bert_folder: Path, tmp_path: Path) -> None:
    """Loading would otherwise draw it at random."""
    folder = _with_head(bert_folder, tmp_path / "other", 2)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 40}))
    with pytest.raises(GuilomoError, match=r"model\.path = .*weights of other shapes.*intermediate"):
        run_of(colour_recipe(model={"path": str(folder)})).fresh_model(0)


def test_damaged_weights_of_the_model(colour_recipe: Any, bert_folder: Path, tmp_path: Path) -> None:
    folder = _with_head(bert_folder, tmp_path / "damaged", 2)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(GuilomoError, match=r"model\.path = .* cannot be loaded"):
        run_of(colour_recipe(model={"path": str(folder)})).fresh_model(0)


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
