"""Rows of an existing Trainer script, in the form the search takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .loss import row_loss


@dataclass(frozen=True)
class Rows:
    """Training and held-out rows with the collator that a Trainer would be given.

    Attributes:
        train, held_out: rows with `labels` and the model's inputs; a `datasets.Dataset` is fine. The held-out rows
            steer the search only, so take them from the training data, not from the test data.
        collator: rows to a batch, the batch dimension first.
        loss: `(logits, labels) -> (loss_sum, count)`, each `(B,)`. The default is the cross-entropy of classification
            `(B, C)` and of next-token prediction `(B, T, V)`.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    collator: Callable[[list[Any]], Mapping[str, Tensor]]
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = row_loss

    def collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return dict(self.collator(list(rows)))

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(logits, labels)
