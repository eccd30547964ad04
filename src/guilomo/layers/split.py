"""Split batches: one forward and one backward in which training rows and held-out rows feed different parameters.

Rows of a batch do not interact inside a network, so the gradient of ``loss(training rows) + loss(held-out rows)``
splits exactly by rows. Where a weight is used, only the first `n` rows may feed it; where a selection mask is used,
only the others may. The result equals two separate passes (arXiv 2506.14646's first-order bilevel step at the price of
one plain step; the construction is ours).

Tensors have the batch in front; ``n`` counts rows of the leading dimension. Without ``n`` the batch is an ordinary one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.n = n
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = dy[: ctx.n].reshape(-1, dy.shape[-1]).T @ x[: ctx.n].reshape(-1, x.shape[-1])
        return dx, dw, None


def linear_of_training_rows(x: Tensor, weight: Tensor, n: int | None) -> Tensor:
    """``x W^T`` whose weight gradient comes from the first `n` rows only; ``x (N, ..., I)``, ``weight (O, I)``."""
    if n is None:
        return F.linear(x, weight)
    out: Tensor = _SplitLinear.apply(x, weight, n)
    return out


def scale_by_held_out_rows(x: Tensor, mask: Tensor, n: int | None) -> Tensor:
    """``x * mask`` whose mask gradient comes from the rows after the first `n` only.

    A mask with a row for every row of `x` was split where it was made.
    """
    if n is None or mask.dim() > 1:
        return x * mask
    return torch.cat([x[:n] * mask.detach(), x[n:] * mask])


def shift_by_held_out_rows(x: Tensor, offset: Tensor, n: int | None) -> Tensor:
    """``x + offset`` whose offset gradient comes from the rows after the first `n` only; see above for one per row."""
    if n is None or offset.dim() > 1:
        return x + offset
    return torch.cat([x[:n] + offset.detach(), x[n:] + offset])
