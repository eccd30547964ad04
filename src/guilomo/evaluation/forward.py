"""Running a model over rows: evaluation mode, batches sorted by length, one loss and one prediction per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import invalid
from ..tasks import Task
from ..tuner import TASKS, knows_tasks

Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all) after each batch."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has the training flag it had before."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that too large a batch fails at once.

    Raises:
        GuilomoError: batch_size is below 1.
    """
    if batch_size < 1:
        raise invalid("batch_size", batch_size, "a number of at least 1")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device


def row_results(
    model: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
    progress: Progress | None = None,
) -> tuple[list[float], list[int], list[int]]:
    """Loss sum (nats), number of predictions and, for classification, predicted class of each row, in row order.

    The third list is empty for language models. Tasks of rows are given to models with a mixture, and to no other.
    """
    losses, counts, classes = [0.0] * len(rows), [0] * len(rows), [0] * len(rows)
    device, done, two_dimensional, takes_tasks = device_of(model), 0, False, knows_tasks(model)
    for batch in batches_by_length([len(row["input_ids"]) for row in rows], batch_size):
        inputs = {name: value.to(device) for name, value in task.collate([rows[index] for index in batch]).items()}
        labels = inputs.pop("labels")
        if not takes_tasks:
            inputs.pop(TASKS, None)
        logits: Tensor = model(**inputs).logits
        loss, count = task.row_loss(logits, labels)
        two_dimensional = logits.dim() == 2
        guesses = logits.argmax(dim=-1).tolist() if two_dimensional else [0] * len(batch)
        for index, *found in zip(batch, loss.tolist(), count.tolist(), guesses, strict=True):
            losses[index], counts[index], classes[index] = found
        done += len(batch)
        if progress is not None:
            progress(done, len(rows))
    return losses, counts, classes if two_dimensional else []
