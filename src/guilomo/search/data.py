"""What the search needs of a task, and the deterministic order in which it sees rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from guilomo.errors import GuilomoError
from guilomo.search.distributed import totals

Batch = dict[str, Tensor]


class SearchData(Protocol):
    """Training and held-out rows, how to batch them, and the loss of each row. `guilomo.tasks.Task` is one."""

    @property
    def train(self) -> Sequence[Any]: ...

    @property
    def held_out(self) -> Sequence[Any]: ...

    def collate(self, rows: Sequence[Any]) -> Batch:
        """Rows to a batch with ``labels`` and the model's inputs, the batch dimension first."""
        ...

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss ``(B,)`` and number of scored labels ``(B,)`` of every row."""
        ...


@dataclass(frozen=True)
class RowOrder:
    """A seeded, endless shuffle of `rows` rows in batches; batch t depends on t alone, so that resuming is exact."""

    rows: int
    batch: int
    seed: int

    def __call__(self, step: int) -> list[int]:
        """Row indices of batch `step`; every row comes once before any comes again."""
        start = step * self.batch
        return [self._at(start + i) for i in range(self.batch)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.rows)
        cached = self.__dict__.get("_epoch")
        if cached is None or cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            cached = (epoch, torch.randperm(self.rows, generator=generator).tolist())
            self.__dict__["_epoch"] = cached
        return int(cached[1][place])


def rows_at(rows: Sequence[Any], indices: list[int]) -> list[Any]:
    return [rows[i] for i in indices]


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def twice(batch: Batch) -> Batch:
    """The batch's rows, followed by the same rows again."""
    rows = len(batch["labels"])
    return {k: torch.cat([v, v]) if isinstance(v, Tensor) and len(v) == rows else v for k, v in batch.items()}


def row_losses(model: nn.Module, batch: Batch, data: SearchData) -> tuple[Tensor, Tensor]:
    """Loss sums and counts ``(B,)`` of a batch, from the model's logits."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else output.logits
    return data.row_loss(logits, batch["labels"])


def mean_loss(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean over the scored labels of all processes; the count is at least 1, so that no labels give 0."""
    total, count = totals([sums.sum(), counts.sum()])
    return total / count.clamp_min(1)


def check_rows(data: SearchData) -> None:
    """Refuses a task that cannot be searched on."""
    for name in ("train", "held_out"):
        if len(getattr(data, name)) == 0:
            raise GuilomoError(
                f"The task has no {name} rows; the search needs some. Raise held_out_fraction or give more rows."
            )
