"""The computation: all experts of a module packed into one pair of matrices.

    y = B ( s * gate * A x )        A (R, I), B (O, R), gate_j = routing weight of the expert that owns rank row j

Mixed ranks cost nothing (only ``R = sum of ranks`` enters), no loop runs over experts and nothing synchronises with
the host. That a mixture of LoRA experts is one LoRA with block-wise gated ranks is stated in SMoRA (arXiv 2501.15103).
The twin that does loop is `guilomo.layers.naive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guilomo.layers.split import linear_of_training_rows, scale_by_held_out_rows


class ExpertLayout(nn.Module):
    """Which rank row belongs to which expert, and its scale.

    Buffers:
        ranks: ``(E,)`` int64, saved with the adapter so that weights cannot be loaded under another allocation.
        spread: ``(E, R)``, ``spread[e, j]`` is the scale of expert e where it owns row j and 0 elsewhere, so that
            ``weights @ spread`` is ``s * gate``. A product is cheaper than indexing and its backward is one too.
    """

    ranks: Tensor
    spread: Tensor

    def __init__(self, ranks: Sequence[int], scales: Sequence[float]) -> None:
        super().__init__()
        self._ranks = tuple(ranks)
        self._scales = tuple(scales)
        self.register_buffer("ranks", torch.tensor(self._ranks, dtype=torch.int64))
        self.register_buffer("spread", self._spread(self.ranks.device, torch.float32), persistent=False)

    def _spread(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        rows = [[scale] * rank for rank, scale in zip(self._ranks, self._scales, strict=True)]
        spread: Tensor = torch.block_diag(*(torch.tensor([row], dtype=dtype) for row in rows))
        return spread.to(device)

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertLayout:
        super()._apply(fn, recurse)
        # Scales such as 16/3 must not be rounded when a model is cast to half precision.
        self.spread = self._spread(self.spread.device, torch.promote_types(self.spread.dtype, torch.float32))
        return self

    @property
    def experts(self) -> int:
        return len(self._ranks)

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """One per expert, on the host."""
        return self._ranks

    @property
    def scales(self) -> tuple[float, ...]:
        """One per expert."""
        return self._scales


def packed_delta(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor | None,
    spread: Tensor,
    rank_mask: Tensor | None = None,
    training_rows: int | None = None,
    drop: float = 0.0,
) -> Tensor:
    """The mixture's contribution, to be added to ``W0 x``.

    Args:
        x: ``(..., I)`` input of the adapted linear.
        a: ``(R, I)`` packed down-projections.
        b: ``(O, R)`` packed up-projections.
        weights: ``(..., E)`` routing weights; None for a single expert, whose weight is 1.
        spread: ``(E, R)`` see `ExpertLayout`.
        rank_mask: ``(R,)`` multiplies the rank rows, in a search.
        training_rows: in a split batch, how many leading rows feed `a` and `b`; the others feed `rank_mask`.
        drop: probability with which a rank activation is dropped.

    Returns:
        ``(..., O)`` in the dtype of `x`.
    """
    hidden = F.dropout(linear_of_training_rows(x, a, training_rows), drop)
    gate = spread.sum(0) if weights is None else weights @ spread.to(weights.dtype)
    hidden = hidden * gate.to(hidden.dtype)
    if rank_mask is not None:
        hidden = scale_by_held_out_rows(hidden, rank_mask.to(hidden.dtype), training_rows)
    return linear_of_training_rows(hidden, b, training_rows)
