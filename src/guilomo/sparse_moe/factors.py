"""The change of one linear as a pair of factors of a rank (FlexMoRE, arXiv 2602.08818; PHLoRA, arXiv 2509.10971)."""

from __future__ import annotations

import torch
from torch import Tensor

from guilomo.errors import invalid
from guilomo.export import Factors

EFFECTIVE = "effective"
"""In place of a rank: the effective rank of each change."""
NEGLIGIBLE = 1e-3
"""Singular values below this share of the largest one do not count in an effective rank (FlexMoRE)."""

RankChoice = int | str


def effective_rank(singular_values: Tensor) -> int:
    """``ceil(exp(H))``, with H the entropy of the singular values ``(n,)`` over their sum; 0 where all are 0.

    Only values above 0.001 of the largest one are counted (FlexMoRE's mode of that name).
    """
    counted = singular_values[singular_values > NEGLIGIBLE * singular_values.max()].double()
    if not len(counted):
        return 0
    share = counted / counted.sum()
    # A flat spectrum of n values has exp(H) = n up to rounding, which must not become n + 1.
    return int(torch.ceil(torch.exp(-torch.special.xlogy(share, share).sum()) - 1e-9))


def balanced_factors(change: Tensor, rank: RankChoice) -> Factors:
    """The nearest ``b @ a`` of a rank to a change ``(O, I)`` in the Frobenius norm, ``U S V^T`` cut to `rank`.

    Both factors get the root of S, so that row j of a and column j of b have equal norms. The error is the root of the
    sum of the squared singular values left out. A rank above ``min(O, I)`` is that, and that of no change is 0.

    Args:
        rank: a number of at least 0, or "effective": `effective_rank` of the singular values.

    Raises:
        GuilomoError: the rank is neither.
    """
    check_rank(rank)
    wide = change.to(torch.promote_types(change.dtype, torch.float32))
    if rank == 0 or not wide.any():
        return Factors(wide.new_zeros(0, wide.shape[1]), wide.new_zeros(wide.shape[0], 0))
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    kept = effective_rank(s) if isinstance(rank, str) else min(rank, len(s))
    root = s[:kept].sqrt()
    return Factors(root[:, None] * vh[:kept], u[:, :kept] * root)


def change_of(weight: Tensor, base: Tensor) -> Tensor:
    """``weight - base`` on the device of the base; exact values of half precision are not rounded again."""
    wide = torch.promote_types(base.dtype, torch.float32)
    return weight.to(base).to(wide) - base.to(wide)


def check_rank(rank: RankChoice) -> None:
    """Refuses what is no rank.

    Raises:
        GuilomoError: neither a whole number of at least 0 nor "effective".
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0
    if not whole and rank != EFFECTIVE:
        raise invalid("rank", rank, f"a whole number of at least 0, or {EFFECTIVE!r}")
