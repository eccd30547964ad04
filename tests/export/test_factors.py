"""Stacking is exact, and cutting is the best that its rank allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guilomo.export import Factors, padded, stacked, truncated

RANKS, SCALES = (1, 4, 2), (16 / 3, 0.7, 2.0)
GATES = torch.tensor([0.31, 0.0, 0.69], dtype=torch.float64)


def _experts(outputs: int = 11, inputs: int = 13) -> tuple[Tensor, Tensor]:
    rank = sum(RANKS)
    return torch.randn(rank, inputs, dtype=torch.float64), torch.randn(outputs, rank, dtype=torch.float64)


def _summed(a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """``sum_e g_e s_e B_e A_e``, expert by expert."""
    pieces = zip(b.split(RANKS, 1), a.split(RANKS, 0), SCALES, gates, strict=True)
    return sum((g * s * b_e @ a_e for b_e, a_e, s, g in pieces), torch.zeros(len(b), a.shape[1], dtype=a.dtype))


def _pair(outputs: int = 11, inputs: int = 13) -> Factors:
    return stacked(*_experts(outputs, inputs), RANKS, SCALES, torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64))


def test_stacked_is_the_weighted_sum_of_the_experts() -> None:
    a, b = _experts()
    pair = stacked(a, b, RANKS, SCALES, GATES)
    assert torch.allclose(pair.b @ pair.a, _summed(a, b, GATES), rtol=0, atol=1e-12)
    assert pair.rank == RANKS[0] + RANKS[2]  # the middle expert has gate 0


# The second shape has fewer outputs than the stacked rank, the third fewer inputs.
@pytest.mark.parametrize("shape", [(11, 13), (5, 13), (11, 3)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_has_the_least_error_of_its_rank(shape: tuple[int, int], rank: int) -> None:
    whole = _pair(*shape)
    cut, kept = truncated(whole, rank)
    delta = whole.b @ whole.a
    values = torch.linalg.svd(delta).S
    assert cut.rank == rank
    error = torch.linalg.norm(delta - cut.b @ cut.a)
    assert torch.allclose(error, values[rank:].square().sum().sqrt(), rtol=1e-10, atol=1e-10)
    assert kept == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), abs=1e-12)


def test_a_cut_at_full_rank_changes_nothing() -> None:
    whole = _pair()
    cut, kept = truncated(whole, whole.rank)
    assert torch.allclose(cut.b @ cut.a, whole.b @ whole.a, rtol=0, atol=1e-10)
    assert kept == pytest.approx(1, abs=1e-15)


def test_an_untrained_mixture_loses_nothing() -> None:
    a, b = _experts()
    cut, kept = truncated(stacked(a, torch.zeros_like(b), RANKS, SCALES, GATES), 1)
    assert kept == 1.0
    assert not (cut.b @ cut.a).any()


def test_padding_adds_zeros_only() -> None:
    whole = _pair()
    wide = padded(whole, 10)
    assert (wide.a.shape, wide.b.shape) == ((10, 13), (11, 10))
    assert torch.equal(wide.a[: whole.rank], whole.a)
    assert torch.equal(wide.b[:, : whole.rank], whole.b)
    assert not wide.a[whole.rank :].any()
    assert not wide.b[:, whole.rank :].any()
