"""Low-rank changes of a weight as a pair of factors: stacking experts, cutting to a rank, padding to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """A change ``b @ a`` of a weight ``(O, I)``.

    Attributes:
        a: ``(R, I)`` float64; b: ``(O, R)`` float64.
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def stacked(a: Tensor, b: Tensor, ranks: Sequence[int], scales: Sequence[float], gates: Tensor) -> Factors:
    """``sum_e g_e s_e B_e A_e`` as one pair: the experts' blocks side by side, gates and scales in B (ours; exact).

    Experts whose gate is 0 are left out.

    Args:
        a: ``(R, I)``, b: ``(O, R)`` packed experts. ranks, scales: one per expert. gates: ``(E,)``.
    """
    weights = gates.to(a.device, torch.float64) * torch.tensor(scales, dtype=torch.float64, device=a.device)
    rows = weights.repeat_interleave(torch.tensor(ranks, device=a.device))
    kept = rows != 0
    return Factors(a.detach().double()[kept], b.detach().double()[:, kept] * rows[kept])


def truncated(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The nearest pair of at most `rank` in the Frobenius norm (Eckart and Young, 1936), and the energy it keeps.

    Only ``R x R`` matrices are decomposed: with ``B = Q_b R_b`` and ``A^T = Q_a R_a`` the singular values of ``B A``
    are those of ``R_b R_a^T``. They are shared evenly by both factors.

    Returns:
        The pair and the share of the squared Frobenius norm that it keeps (1 where the change is 0).
    """
    q_b, r_b = torch.linalg.qr(factors.b)
    q_a, r_a = torch.linalg.qr(factors.a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root, energy = s[:rank].sqrt(), s.square()
    kept = float(energy[:rank].sum() / energy.sum()) if energy.any() else 1.0
    return Factors(root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root), kept


def padded(factors: Factors, rank: int) -> Factors:
    """The same change at a higher rank: rows of zeros in `a`, columns of zeros in `b`."""
    more = rank - factors.rank
    return Factors(F.pad(factors.a, (0, 0, 0, more)), F.pad(factors.b, (0, more)))
