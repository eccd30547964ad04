"""A task ready to train on and to score: token rows of three splits, the collation and the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import unknown
from .collate import Collator
from .config import TaskConfig
from .loss import row_loss
from .schema import Example
from .tokenize import TokenRow

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
            (id), and `router_task_ids` (an int) in a mixed task.
        examples: the untokenised rows of each split, in the order of the token rows; empty for lm.
        truncated: how many texts or prompts of each split were cut at `max_length`.
        data_hash: sha256 over the content of all splits in order; for lm over the token ids.
        tokenizer: the tokenizer that made the ids.
        config: what the task was built from.
        collator: pads rows and stacks them.
        parts: of a mixed task, the names of its tasks in the order of their ids; else empty.
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
    parts: tuple[str, ...] = ()

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

    def task_id(self, example: Example) -> int | None:
        """The id of the part that a row of a mixed task belongs to; None where there are no parts."""
        return self.parts.index(example.task) if self.parts else None

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pads rows on the right: `input_ids`, `attention_mask` `(B, T)`, `labels` `(B,)` or `(B, T)`."""
        return self.collator(rows)

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`(loss_sum, count)`, each `(B,)`; see `guilomo.tasks.loss.row_loss`."""
        return row_loss(logits, labels)
