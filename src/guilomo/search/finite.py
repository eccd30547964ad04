"""Reads a step's losses and gradient norms, and stops the search where one is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers import first_non_finite, remedy
from guilomo.search.data import Batch, mean_loss, row_losses
from guilomo.search.split_pass import constant, masked
from guilomo.tuner import SelectionMasks

if TYPE_CHECKING:
    from guilomo.search.loop import Search


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norm ``()`` of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def finite_values(
    search: Search, batch: Batch, masks: dict[str, SelectionMasks], named: dict[str, Tensor]
) -> list[float]:
    """The values ``()`` as numbers, read from the device together; they came from the batch under the masks.

    Raises:
        GuilomoError: one is not finite; names the step, the module where that arose and what to lower.
    """
    values: list[float] = torch.stack([value.detach() for value in named.values()]).tolist()
    for name, value in zip(named, values, strict=True):
        if not math.isfinite(value):
            advice = remedy("search", search.config.learning_rate, search.config.max_grad_norm, search.model)
            where = _where(search, batch, masks)
            raise GuilomoError(f"The {name} became {value} at step {search.step} of the search, {where}. {advice}")
    return values


def _where(search: Search, batch: Batch, masks: dict[str, SelectionMasks]) -> str:
    with torch.enable_grad(), masked(search.problem.context, constant(masks)):
        return first_non_finite(search.model, lambda: mean_loss(*row_losses(search.model, batch, search.data)))
