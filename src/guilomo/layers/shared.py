"""One A for all experts: ``z = A x`` is made once, and every expert reads it.

HydraLoRA (arXiv 2404.19245) and MoSLD (arXiv 2412.08946) have one A of r rows and a B for each expert:

    y = W0 x + s sum_e w_e B_e (A x)        A (r, I), B_e (O, r)

Packed, the rank rows of the mixture are those of A, E times over.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stacked_identities(experts: int, a: Tensor) -> Tensor:
    """``(E r, r)`` for ``a (r, I)``: as a down-projection it repeats z for every expert, whatever reads it."""
    return torch.eye(len(a), dtype=a.dtype, device=a.device).repeat(experts, 1)
