"""Tiny random models and a local tokenizer; nothing here reaches for the network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from guilomo.tasks import Task, TaskConfig, build_task

os.environ["HF_HUB_OFFLINE"] = "1"

WORDS = ["red", "green", "blue", "a long answer of many words", "no"]


@pytest.fixture(scope="session")
def bpe() -> Any:
    """A byte-level BPE tokenizer with start, end and pad tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(WORDS, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    return make(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.5,  # large, so that the random model has opinions
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


@pytest.fixture
def causal() -> LlamaForCausalLM:
    return llama()


@pytest.fixture
def classifier(bpe: PreTrainedTokenizerFast) -> BertForSequenceClassification:
    torch.manual_seed(0)
    make: Any = BertConfig  # num_labels is missing from its annotations
    config = make(
        num_labels=3,
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.5,
    )
    return BertForSequenceClassification(config)


def rows(kind: str, count: int, prefix: str) -> list[dict[str, Any]]:
    """Rows whose inputs differ a lot in length, so that batching and padding matter."""
    made = []
    for index in range(count):
        row: dict[str, Any] = {
            "id": f"{prefix}{index}",
            "type": kind,
            "input": f"{prefix} " + "word " * (index * 7 % 11),
        }
        row["input"] += str(index)
        if kind == "gen":
            made.append({**row, "answer": WORDS[index % 5]})
            continue
        choices = WORDS[:3] if kind == "cls" else WORDS[index % 3 :][:4]
        label = index % len(choices)
        made.append({**row, "choices": choices, "label": label, "answer": choices[label]})
    return made


@pytest.fixture
def make_task(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> Any:
    """`make_task(type, kind, **options)` -> a task of 12 training and 17 test rows."""

    def make(row_type: str, kind: str, **options: Any) -> Task:
        for split, count in (("train", 12), ("test", 17)):
            text = "".join(json.dumps(row) + "\n" for row in rows(row_type, count, split))
            (tmp_path / f"t.{split}.jsonl").write_text(text)
        settings = {"kind": kind, "source": str(tmp_path), "name": "t", "max_length": 128, **options}
        return build_task(TaskConfig(**settings), bpe)

    return make


@pytest.fixture
def text_task(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> Task:
    (tmp_path / "t.txt").write_text(" ".join(WORDS[index * 7 % 5] for index in range(700)))
    return build_task(TaskConfig(kind="lm", source=str(tmp_path / "t.txt"), max_length=32), bpe)
