"""The packed computation equals the naive loop, outputs and gradients, and has the symmetries of a mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guilomo.allocation import Allocation, ModulePlan
from guilomo.allocation.plan import SCALINGS
from guilomo.layers import ExpertLayout, packed_delta
from guilomo.layers.naive import naive_delta, naive_topk_weights
from guilomo.layers.routers import DenseRouter, TopKRouter
from mixture_cases import CASES

I, O, T = 13, 7, 11  # noqa: E741  odd on purpose: nothing may rely on powers of two


def scales_of(ranks: tuple[int, ...], scaling: str = "alpha_over_r") -> tuple[float, ...]:
    plan = ModulePlan(I, O, ranks, top_k=1)
    return Allocation({"m": plan}, scaling=scaling, alpha=7.0).scales("m")


def parameters(ranks: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """A, B, router weight, in float64."""
    a = torch.randn(sum(ranks), I, dtype=torch.float64)
    b = torch.randn(O, sum(ranks), dtype=torch.float64)
    return a, b, torch.randn(len(ranks), I, dtype=torch.float64)


def router_with(weight: Tensor, top_k: int) -> TopKRouter:
    router = TopKRouter(weight.shape[1], weight.shape[0], top_k).to(weight.dtype)
    with torch.no_grad():
        router.weight.copy_(weight)
    return router


def relative(error: Tensor, reference: Tensor) -> float:
    return float((error.abs().max() / reference.abs().max().clamp_min(1e-300)).detach()) if reference.numel() else 0.0


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_loop(case: str, scaling: str) -> None:
    ranks, top_k = CASES[case]
    scales = scales_of(ranks, scaling)
    a, b, w = parameters(ranks)
    x = torch.randn(T, I, dtype=torch.float64)
    dy = torch.randn(T, O, dtype=torch.float64)
    found, wanted = [], []
    for results, packed in ((found, True), (wanted, False)):
        leaves = [t.clone().requires_grad_() for t in (x, a, b, w)]
        x_, a_, b_, w_ = leaves
        if packed:
            router = router_with(w_.detach(), top_k)
            layout = ExpertLayout(ranks, scales).double()
            y = packed_delta(x_, a_, b_, router(x_).weights, layout.spread)
            leaves[3] = router.weight
        else:
            y = naive_delta(x_, a_, b_, naive_topk_weights(x_ @ w_.T, top_k), ranks, scales)
        results += [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for name, ours, reference in zip(("y", "dx", "dA", "dB", "dRouter"), found, wanted, strict=True):
        if name == "dRouter" and len(ranks) == 1:
            assert torch.equal(ours, torch.zeros_like(ours))  # a single expert's gate is the constant 1
            continue
        assert reference.abs().max() > 1e-3, f"{name} is trivially 0, so comparing it means nothing"
        assert relative(ours - reference, reference) < 1e-12, name


def test_no_tokens() -> None:
    ranks = (3, 1, 2)
    a, b, w = parameters(ranks)
    x = torch.zeros(0, I, dtype=torch.float64, requires_grad=True)
    router = router_with(w, 2)
    y = packed_delta(x, a, b, router(x).weights, ExpertLayout(ranks, scales_of(ranks)).double().spread)
    assert y.shape == (0, O)
    assert naive_delta(x, a, b, naive_topk_weights(x @ w.T, 2), ranks, scales_of(ranks)).shape == (0, O)
    y.sum().backward()
    assert torch.equal(router.weight.grad, torch.zeros_like(w))


def test_leading_dimensions_are_only_tokens() -> None:
    ranks = (3, 1, 2)
    a, b, w = parameters(ranks)
    router, spread = router_with(w, 2), ExpertLayout(ranks, scales_of(ranks)).double().spread
    x = torch.randn(2, 3, I, dtype=torch.float64)
    flat = x.reshape(6, I)
    y = packed_delta(x, a, b, router(x).weights, spread)
    assert torch.allclose(y.reshape(6, O), packed_delta(flat, a, b, router(flat).weights, spread), rtol=1e-14)


def test_bfloat16_stays_within_one_percent_of_float64() -> None:
    """Same bfloat16 inputs and weights, computed in bfloat16 and in float64, with the gates of the former."""
    ranks = (3, 8, 1, 5)
    a, b, w = (t.bfloat16() for t in parameters(ranks))
    x = torch.randn(257, I).bfloat16()
    layout = ExpertLayout(ranks, scales_of(ranks))
    weights = router_with(w.double(), 2).bfloat16()(x).weights
    y = packed_delta(x, a, b, weights, layout.spread)
    assert y.dtype == torch.bfloat16
    exact = packed_delta(x.double(), a.double(), b.double(), weights.double(), layout.spread.double())
    assert torch.linalg.norm(y.double() - exact) / torch.linalg.norm(exact) < 1e-2


def test_the_order_of_experts_does_not_matter() -> None:
    ranks, order = (3, 8, 1, 5), (2, 0, 3, 1)
    a, b, w = parameters(ranks)
    x = torch.randn(T, I, dtype=torch.float64)
    starts = [sum(ranks[:e]) for e in range(4)]
    rows = torch.cat([torch.arange(starts[e], starts[e] + ranks[e]) for e in order])
    permuted = tuple(ranks[e] for e in order)
    y = packed_delta(x, a, b, router_with(w, 2)(x).weights, ExpertLayout(ranks, scales_of(ranks)).double().spread)
    same = packed_delta(
        x,
        a[rows],
        b[:, rows],
        router_with(w[list(order)], 2)(x).weights,
        ExpertLayout(permuted, scales_of(permuted)).double().spread,
    )
    assert relative(y - same, y) < 1e-12


def test_an_expert_split_into_two_halves_changes_nothing() -> None:
    """Dense gates: one expert of weight p is the same as two copies of weight p / 2."""
    ranks = (3, 2)
    a, b, _ = parameters(ranks)
    x = torch.randn(T, I, dtype=torch.float64)
    router = DenseRouter(I, 2, 2).double()
    p = router(x).weights
    y = packed_delta(x, a, b, p, ExpertLayout(ranks, scales_of(ranks)).double().spread)
    twice = (3, 3, 2)
    doubled = packed_delta(
        x,
        torch.cat([a[:3], a]),
        torch.cat([b[:, :3], b], dim=1),
        torch.stack([p[:, 0] / 2, p[:, 0] / 2, p[:, 1]], dim=1),
        ExpertLayout(twice, scales_of(twice)).double().spread,
    )
    assert relative(y - doubled, y) < 1e-12


def test_a_token_does_not_see_its_batch() -> None:
    ranks = (3, 8, 1, 5)
    a, b, w = parameters(ranks)
    router, spread = router_with(w, 2), ExpertLayout(ranks, scales_of(ranks)).double().spread
    x = torch.randn(T, I, dtype=torch.float64)
    together = packed_delta(x, a, b, router(x).weights, spread)
    for t in range(T):
        alone = packed_delta(x[t : t + 1], a, b, router(x[t : t + 1]).weights, spread)
        assert relative(alone - together[t], together) < 1e-12


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_scales_survive_casts_exactly(cast: str) -> None:
    """16/3 is no half-precision number: casting a model must not round the scale."""
    ranks = (3, 8, 1)
    scales = (16 / 3, 2.0, 0.1)
    layout = getattr(ExpertLayout(ranks, scales), cast)()
    dtype = torch.float64 if cast == "double" else torch.float32
    assert layout.spread.dtype == dtype
    assert layout.ranks.dtype == torch.int64
    for expert, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        row = layout.spread[expert]
        assert row[row != 0].tolist() == torch.full((rank,), scale, dtype=dtype).tolist()
    assert torch.equal(layout.spread.sum(0) != 0, torch.ones(12, dtype=torch.bool))
    assert torch.equal(layout.half().double().spread, ExpertLayout(ranks, scales).double().spread)


def test_only_the_ranks_are_saved() -> None:
    assert list(ExpertLayout((3, 1), (1.0, 2.0)).state_dict()) == ["ranks"]
