"""A low-rank branch behind the frozen linear (Hydra, arXiv 2309.06922).

    y0 = W0 x + b0
    y  = y0 + s_a B A x + s_b D C y0        A (r_a, I), B (O, r_a), C (r_b, O), D (O, r_b)

Both branches are linear in x, so that they merge exactly: ``W = W0 + s_a B A + s_b D C W0``, ``b = b0 + s_b D C b0``.
Hydra has one scale for both; here each branch has that of its own rank, which is the same with ``scaling="constant"``.
Biases in the branches, which its authors have for images, are left out. Where they drop activations is not known
here: ours drops what each branch reads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sequential_delta(
    y: Tensor, c: Tensor, d: Tensor, scale: float, drop_input: float = 0.0, drop_rank: float = 0.0
) -> Tensor:
    """``s D C y``, to be added to y.

    Args:
        y: ``(..., O)`` output of the frozen linear. c: ``(r_b, O)``. d: ``(O, r_b)``.
        drop_input, drop_rank: chance to drop an entry of y, or of C y.

    Returns:
        ``(..., O)`` in the dtype of `y`.
    """
    hidden = F.linear(F.dropout(y.to(c.dtype), drop_input), c)
    return F.linear(F.dropout(hidden, drop_rank) * scale, d).to(y.dtype)
