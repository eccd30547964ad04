"""A task ready to train on and to score: token rows of three splits, the collation and the loss."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import GuilomoError, invalid, unknown
from .collate import Collator, padding_id
from .config import TaskConfig
from .load import load_documents, load_examples, task_name
from .loss import row_loss
from .schema import Example
from .split import fraction_count
from .templates import resolve_template
from .tokenize import TokenRow, block_rows, classification_rows, prompt_rows, required_lengths, text_blocks

SPLITS = ("train", "held_out", "test")


@dataclass
class Task:
    """Data of one task for one tokenizer.

    Attributes:
        name: what the task is called in reports.
        kind: "classification", "causal_lm" or "lm".
        labels: class names for classification, else None.
        train, held_out, test: token rows: `input_ids`, `attention_mask` (lists of ints), `labels` (an int for
            classification; a list with -100 on the prompt for causal_lm; a copy of the ids for lm), `example`
            (id).
        examples: the untokenised rows of each split, in the order of the token rows; empty for lm.
        truncated: how many texts or prompts of each split were cut at `max_length`.
        data_hash: sha256 over the content of all splits in order; for lm over the token ids.
        tokenizer: the tokenizer that made the ids.
        config: what the task was built from.
        collator: pads rows and stacks them.
    """

    name: str
    kind: str
    labels: list[str] | None
    train: list[TokenRow]
    held_out: list[TokenRow]
    test: list[TokenRow]
    examples: dict[str, list[Example]]
    truncated: dict[str, int]
    data_hash: str
    tokenizer: PreTrainedTokenizerBase
    config: TaskConfig
    collator: Collator

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 for tasks that are not classification."""
        return len(self.labels) if self.labels else 0

    def rows(self, split: str) -> list[TokenRow]:
        """Token rows of "train", "held_out" or "test".

        Raises:
            GuilomoError: no such split.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        rows: list[TokenRow] = getattr(self, split)
        return rows

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pads rows on the right: `input_ids`, `attention_mask` `(B, T)`, `labels` `(B,)` or `(B, T)`."""
        return self.collator(rows)

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`(loss_sum, count)`, each `(B,)`; see `guilomo.tasks.loss.row_loss`."""
        return row_loss(logits, labels)


def build_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Loads, divides and tokenises the data that `config` describes.

    Raises:
        GuilomoError: the data cannot be read, do not fit the kind of task, or do not fit into `max_length`.
    """
    if config.kind == "lm":
        return _language_task(config, tokenizer)
    examples = load_examples(config)
    if config.kind == "causal_lm":
        for split in SPLITS:
            examples[split] = _fitting(tokenizer, examples[split], config, split)
    labels = _class_names(examples) if config.kind == "classification" else None
    rows: dict[str, list[TokenRow]] = {}
    truncated = {}
    template = resolve_template(config.template)
    for split in SPLITS:
        if config.kind == "classification":
            made = classification_rows(tokenizer, examples[split], config.max_length)
        else:
            made = prompt_rows(tokenizer, examples[split], template, config.max_length, config.append_eos)
        rows[split], truncated[split] = made
    canonical = {split: [asdict(example) for example in examples[split]] for split in SPLITS}
    return _assemble(config, tokenizer, labels, rows, examples, truncated, _digest(canonical))


def _fitting(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: TaskConfig, split: str
) -> list[Example]:
    """The examples whose answers fit into `max_length`; the others stop the run, or are dropped with a warning."""
    needed = required_lengths(tokenizer, examples, config.append_eos)
    kept = [example for example, length in zip(examples, needed, strict=True) if length <= config.max_length]
    lost = len(examples) - len(kept)
    if not lost:
        return examples
    if not config.drop_too_long or not kept:
        allowed = f"at least {max(needed)}: the answers of {lost} of {len(examples)} {split} rows do not fit"
        remedy = "Raise it as far as the model allows, or set drop_too_long."
        raise invalid("max_length", config.max_length, allowed, remedy)
    warnings.warn(
        f"{lost} of {len(examples)} {split} rows of {task_name(config)!r} were left out: their answers are longer than "
        f"max_length = {config.max_length} (the longest needs {max(needed)}).",
        stacklevel=3,
    )
    return kept


def _language_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Contiguous parts of the text, in the order train, held-out, test, unless files give them apart."""
    documents = load_documents(config)
    blocks = {
        split: None if found is None else text_blocks(tokenizer, found, config.max_length)
        for split, found in documents.items()
    }
    train = blocks["train"] or []
    held_out, test = blocks["held_out"], blocks["test"]
    remedy = f"source = {config.source!r} gives too little text: shorten max_length = {config.max_length} or add text."
    if test is None:
        count = fraction_count(len(train), config.test_fraction, "test blocks", remedy)
        train, test = train[: len(train) - count], train[len(train) - count :]
    train, test = train[: config.train_size], test[: config.test_size]
    if held_out is None:
        count = fraction_count(len(train), config.held_out_fraction, "held-out blocks", remedy)
        train, held_out = train[: len(train) - count], train[len(train) - count :]
    parts = dict(zip(SPLITS, (train, held_out, test), strict=True))
    if not train or not test:
        raise GuilomoError(remedy)
    rows: dict[str, list[TokenRow]] = {}
    for split in SPLITS:
        rows[split] = block_rows(parts[split], first=sum(map(len, rows.values())))
    nothing: dict[str, list[Example]] = {split: [] for split in SPLITS}
    return _assemble(config, tokenizer, None, rows, nothing, dict.fromkeys(SPLITS, 0), _digest(parts))


def _class_names(examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """The label names, which all rows must share.

    Raises:
        GuilomoError: rows without classes, rows with names of their own, or only one class to learn from.
    """
    names = examples["train"][0].choices
    for example in (row for split in SPLITS for row in examples[split]):
        if example.type != "cls" or example.choices != names or names is None:
            found = example.type if example.type != "cls" else example.choices
            allowed = f"rows of type 'cls' that share one list of label names ({names})"
            remedy = "Use kind: causal_lm for multiple choice and free answers."
            raise invalid(f"example {example.id!r}", found, allowed, remedy)
    seen = {example.label for example in examples["train"]}
    if len(seen) < 2:
        only = examples["train"][0].answer
        raise invalid("classes among the training rows", only, "at least two classes", "Use more or other rows.")
    return list(names or ())


def _assemble(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    rows: dict[str, list[TokenRow]],
    examples: dict[str, list[Example]],
    truncated: dict[str, int],
    data_hash: str,
) -> Task:
    return Task(
        name=task_name(config),
        kind=config.kind,
        labels=labels,
        **rows,
        examples=examples,
        truncated=truncated,
        data_hash=data_hash,
        tokenizer=tokenizer,
        config=config,
        collator=Collator(padding_id(tokenizer), config.pad_to_multiple_of, config.max_length),
    )


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
