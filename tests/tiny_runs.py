"""Tiny models, tokenizers, data files and recipes for whole runs that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from guilomo.run import Run, RunConfig
from guilomo.run.pipeline import StageProgress

COLOURS = ["red", "green"]
TIMES = {"created", "seconds", "train_seconds", "step_seconds", "estimate", "output", "command"}
"""Keys of results.json that may differ between two runs of one recipe in two folders."""


def tokenizer() -> Any:
    """A byte-level BPE tokenizer with start, end and pad tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*COLOURS, "the thing is very"], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    return make(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=320, max_position_embeddings=64, initializer_range=0.2)
    return _save(BertForSequenceClassification(config), tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("models") / "llama")


def colour_rows(count: int, split: str) -> list[dict[str, Any]]:
    """Rows whose class is the colour they name."""
    rows = []
    for index in range(count):
        label = (index * 7 // 3) % 2
        text = f"the {split} thing {index} is {'very ' * (index % 3)}{COLOURS[label]}"
        row = {"id": f"{split}-{index}", "type": "cls", "input": text, "choices": COLOURS, "label": label}
        rows.append({**row, "instruction": "Which colour?", "answer": COLOURS[label]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """colours.train.jsonl (48 rows), colours.test.jsonl (20 rows) and colours.txt."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "colours.train.jsonl", colour_rows(48, "train"))
    write_rows(folder / "colours.test.jsonl", colour_rows(20, "test"))
    text = " ".join(row["input"] for row in colour_rows(60, "text"))
    (folder / "colours.txt").write_text(text, encoding="utf-8")
    return folder


def recipe(base_model: Path, data: dict[str, Any], folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a few steps; `changes` are laid over it, group by group."""
    base: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder),
        "model": {"path": str(base_model), "device": "cpu"},
        "task": {"max_length": 64, **data},
        "mixture": {"top_k": 2},
        "budget": {"experts": 4, "rank": 4},
        "search": {
            "max_experts": 5,
            "max_rank": 6,
            "steps": 6,
            "warmup_steps": 2,
            "batch_size": 8,
            "held_out_batch_size": 4,
            "record_every": 2,
            "checkpoint_every": 4,
        },
        "train": {"max_steps": 5, "batch_size": 8, "log_every": 2, "save_every": 3},
        "methods": ["guilomo", "lora"],
    }
    for key, value in changes.items():
        base[key] = {**base[key], **value} if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base


@pytest.fixture
def colour_recipe(bert_folder: Path, colours: Path, tmp_path: Path) -> Any:
    """`colour_recipe(**changes)` -> a classification recipe that writes below tmp_path."""

    def make(output: str = "run", **changes: Any) -> dict[str, Any]:
        task = {"kind": "classification", "source": str(colours), "name": "colours", **changes.pop("task", {})}
        return recipe(bert_folder, task, tmp_path / output, **changes)

    return make


@pytest.fixture
def text_recipe(llama_folder: Path, colours: Path, tmp_path: Path) -> Any:
    """`text_recipe(kind, **changes)` -> a causal_lm or lm recipe that writes below tmp_path."""

    def make(kind: str, output: str = "run", **changes: Any) -> dict[str, Any]:
        source = colours / "colours.txt" if kind == "lm" else colours
        task = {"kind": kind, "source": str(source), "name": "colours"}
        task |= {**({"max_length": 32} if kind == "lm" else {}), **changes.pop("task", {})}
        return recipe(llama_folder, task, tmp_path / output, **changes)

    return make


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def config_of(content: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(content)


class StopAfter:
    """Progress that counts the steps of one stage, and asks to stop after so many."""

    def __init__(self, stage: str, steps: int) -> None:
        self.stage, self.steps, self.seen = stage, steps, 0

    def progress(self, stage: str, step: int, steps: int, text: str) -> None:
        if stage == self.stage:
            self.seen += 1

    def should_stop(self) -> bool:
        return self.seen >= self.steps


def run_of(content: dict[str, Any], stop: StopAfter | None = None, progress: StageProgress | None = None) -> Run:
    if stop is not None:
        return Run(config_of(content), progress=stop.progress, should_stop=stop.should_stop)
    return Run(config_of(content), **({} if progress is None else {"progress": progress}))


def without_times(value: Any) -> Any:
    """Results without what may differ between two equal runs."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def quicken_page(patch: pytest.MonkeyPatch) -> None:
    """Drawing a page takes longer than a tiny run."""
    patch.setattr("guilomo.run.pipeline.write_report", lambda results, path: path.write_text("a page"))


@pytest.fixture(autouse=True)
def quick_page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page is drawn; tests of the page ask for `real_page`."""
    if "real_page" not in request.fixturenames:
        quicken_page(monkeypatch)


@pytest.fixture(scope="module")
def real_page() -> None:
    """Asked for by tests that look at the page."""
