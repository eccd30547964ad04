"""Tokens sorted by expert give what the naive loop gives, outputs and gradients, and make nothing as large as y."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guilomo.layers import ExpertLayout, packed_delta
from guilomo.layers.naive import naive_delta
from guilomo.layers.sorted import gather_shrink, scatter_expand, sort_tokens, sorted_delta

I, O, T = 13, 7, 11  # noqa: E741  odd on purpose: nothing may rely on powers of two

CASES = {
    "mixed ranks": ((3, 8, 1, 5), 2, ()),
    "one rank": ((4, 4, 4), 2, ()),
    "one expert": ((4,), 1, ()),
    "all chosen": ((2, 3, 5), 3, ()),
    "top-1": ((3, 1, 2), 1, ()),
    "many": ((2,) * 9, 4, ()),
    "empty experts": ((3, 8, 1, 5), 2, (0, 3)),
    "no expert": ((3, 1, 2), 2, (0, 1, 2)),
}  # ranks, top-k, experts that no token chose
WIDE_RANKS = (2, 1, 2, 1)
NAMES = ("dx", "dA", "dB", "dWeights")


def scales_of(ranks: Sequence[int]) -> tuple[float, ...]:
    return tuple(7.0 / rank for rank in ranks)


def relative(error: Tensor, reference: Tensor) -> float:
    return float((error.abs().max() / reference.abs().max().clamp_min(1e-300)).detach())


def problem(
    ranks: Sequence[int], top_k: int, empty: Sequence[int] = (), tokens: int = T
) -> tuple[list[Tensor], Tensor]:
    """x, A, B, weights in float64, all of them leaves, and who chose whom."""
    experts = len(ranks)
    leaves = [
        torch.randn(tokens, I, dtype=torch.float64),
        torch.randn(sum(ranks), I, dtype=torch.float64),
        torch.randn(O, sum(ranks), dtype=torch.float64),
        torch.rand(tokens, experts, dtype=torch.float64) + 0.1,
    ]
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    chosen.scatter_(1, torch.rand(tokens, experts).topk(top_k).indices, True)
    chosen[:, list(empty)] = False
    return [leaf.requires_grad_() for leaf in leaves], chosen


def around(base: Callable[[Tensor], Tensor], ranks: Sequence[int], inplace: bool = True) -> Callable[..., Tensor]:
    """The two nodes with `base` between them, of x, A, B, weights and who chose whom."""

    def mixture(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = sort_tokens(chosen, ranks)
        x, h = gather_shrink(x, a, order)
        return scatter_expand(base(x), h, weights, order, b, scales_of(ranks), inplace)

    return mixture


def frozen_linear() -> Callable[[Tensor], Tensor]:
    weight, bias = torch.randn(O, I, dtype=torch.float64), torch.randn(O, dtype=torch.float64)
    return lambda x: F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_loop(case: str) -> None:
    ranks, top_k, empty = CASES[case]
    leaves, chosen = problem(ranks, top_k, empty)
    x, a, b, weights = leaves
    scales = scales_of(ranks)
    wanted = naive_delta(x, a, b, weights * chosen, ranks, scales)
    found = sorted_delta(*leaves, chosen, ranks, scales)
    dy = torch.randn(T, O, dtype=torch.float64)
    assert relative(found - wanted, wanted) < 1e-12
    gradients = zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True)
    for name, (ours, reference) in zip(NAMES, gradients, strict=True):
        assert case == "no expert" or reference.abs().max() > 1e-3, f"{name} is trivially 0"
        assert relative(ours - reference, reference) < 1e-12, name


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_loop_around_a_frozen_linear(case: str, inplace: bool) -> None:
    ranks, top_k, empty = CASES[case]
    leaves, chosen = problem(ranks, top_k, empty)
    x, a, b, weights = leaves
    base = frozen_linear()
    wanted = base(x) + naive_delta(x, a, b, weights * chosen, ranks, scales_of(ranks))
    found = around(base, ranks, inplace)(*leaves, chosen)
    dy = torch.randn(T, O, dtype=torch.float64)
    assert relative(found - wanted, wanted) < 1e-12
    gradients = zip(torch.autograd.grad(found, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True)
    for name, (ours, reference) in zip(NAMES, gradients, strict=True):
        assert relative(ours - reference, reference) < 1e-12, name


def test_equals_the_packed_computation() -> None:
    ranks, top_k, _ = CASES["mixed ranks"]
    (x, a, b, weights), chosen = problem(ranks, top_k)
    spread = ExpertLayout(ranks, scales_of(ranks)).double().spread
    wanted = packed_delta(x, a, b, weights * chosen, spread)
    assert relative(sorted_delta(x, a, b, weights, chosen, ranks, scales_of(ranks)) - wanted, wanted) < 1e-12


def test_the_order_is_by_expert_and_then_by_token() -> None:
    chosen = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0]]).bool()
    order = sort_tokens(chosen, (2, 1, 3))
    assert [tokens.tolist() for tokens in order.tokens] == [[0, 2], [], [0, 1]]
    assert order.pairs.tolist() == [0, 6, 2, 5]  # token * E + expert


def test_no_tokens() -> None:
    ranks = (3, 1, 2)
    leaves, chosen = problem(ranks, 2, tokens=0)
    y = around(frozen_linear(), ranks)(*leaves, chosen)
    assert y.shape == (0, O)
    y.sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_leading_dimensions_are_only_tokens() -> None:
    ranks = (3, 1, 2)
    leaves, chosen = problem(ranks, 2, tokens=6)
    x, a, b, weights = leaves
    base = frozen_linear()
    y = around(base, ranks)(*leaves, chosen)
    flat = torch.autograd.grad(y, leaves, torch.ones_like(y))
    x, weights = (t.detach().unflatten(0, (2, 3)).requires_grad_() for t in (x, weights))
    shaped = [x, a, b, weights]
    found = around(base, ranks)(*shaped, chosen.unflatten(0, (2, 3)))
    assert found.shape == (2, 3, O)
    assert torch.equal(found.reshape(6, O), y)
    for ours, reference in zip(torch.autograd.grad(found, shaped, torch.ones_like(found)), flat, strict=True):
        assert torch.equal(ours.reshape(reference.shape), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_changes_no_bit(dtype: torch.dtype) -> None:
    ranks, top_k, _ = CASES["mixed ranks"]
    leaves, chosen = problem(ranks, top_k)
    leaves = [*(t.detach().to(dtype).requires_grad_() for t in leaves[:3]), leaves[3].detach().float().requires_grad_()]
    base = frozen_linear()
    inside, outside = (around(base, ranks, inplace)(*leaves, chosen) for inplace in (True, False))
    assert torch.equal(inside, outside)
    dy = torch.randn_like(inside)
    found, wanted = torch.autograd.grad(inside, leaves, dy), torch.autograd.grad(outside, leaves, dy, create_graph=True)
    assert all(torch.equal(ours, reference) for ours, reference in zip(found, wanted, strict=True))


def test_in_place_writes_where_it_can_and_only_then() -> None:
    ranks, top_k, _ = CASES["mixed ranks"]
    (x, a, b, weights), chosen = problem(ranks, top_k)
    order = sort_tokens(chosen, ranks)
    _, h = gather_shrink(x, a, order)

    def expand(y: Tensor, inplace: bool) -> Tensor:
        return scatter_expand(y, h, weights, order, b, scales_of(ranks), inplace)

    y = torch.randn(T, O, dtype=torch.float64)
    before = y.clone()
    strided = y.T.contiguous().T
    outside = expand(y, False)
    assert torch.equal(y, before)
    assert torch.equal(expand(strided, True), outside)
    assert torch.equal(strided, before)
    assert expand(y, True) is y
    assert torch.equal(y, outside)


def test_only_what_is_trained_has_a_gradient() -> None:
    """Each of x, A, B and the weights in turn is the only one that needs a gradient."""
    ranks, top_k, _ = CASES["mixed ranks"]
    leaves, chosen = problem(ranks, top_k)
    mixture = around(frozen_linear(), ranks)
    dy = torch.randn(T, O, dtype=torch.float64)
    wanted = torch.autograd.grad(mixture(*leaves, chosen), leaves, dy)
    for i, name in enumerate(NAMES):
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        (found,) = torch.autograd.grad(mixture(*alone, chosen), alone[i], dy)
        assert torch.equal(found, wanted[i]), name


def test_the_frozen_linear_is_asked_for_no_gradient_that_x_does_not_need() -> None:
    ranks, top_k, _ = CASES["mixed ranks"]
    (x, a, _, _), chosen = problem(ranks, top_k)
    passed, h = gather_shrink(x.detach(), a, sort_tokens(chosen, ranks))
    assert not passed.requires_grad
    assert h.requires_grad


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("empty", [(), (1,)])
def test_first_and_second_derivatives_are_those_of_finite_differences(empty: tuple[int, ...], inplace: bool) -> None:
    ranks = (2, 1, 3)
    leaves, chosen = problem(ranks, 2, empty, tokens=3)
    mixture = around(frozen_linear(), ranks, inplace)
    assert torch.autograd.gradcheck(lambda *args: mixture(*args, chosen), leaves)
    assert torch.autograd.gradgradcheck(lambda *args: mixture(*args, chosen), leaves)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_equal_those_of_the_naive_loop(case: str) -> None:
    ranks, top_k, empty = CASES[case]
    leaves, chosen = problem(ranks, top_k, empty)
    base = frozen_linear()

    def naive(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        return base(x) + naive_delta(x, a, b, weights * chosen, ranks, scales_of(ranks))

    second = []
    for mixture in (around(base, ranks), naive):
        first = torch.autograd.grad(mixture(*leaves, chosen).square().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for name, ours, reference in zip(NAMES, *second, strict=True):
        assert relative(ours - reference, reference) < 1e-12, name


def test_a_recorded_backward_leaves_the_gradient_that_came_in_as_it_is() -> None:
    ranks, top_k, _ = CASES["mixed ranks"]
    leaves, chosen = problem(ranks, top_k)
    frozen, dy = torch.randn(O, I, dtype=torch.float64), torch.randn(T, O, dtype=torch.float64)
    came_in: list[Tensor] = []

    def base(x: Tensor) -> Tensor:
        x.register_hook(came_in.append)
        return F.linear(x, frozen)

    torch.autograd.grad(around(base, ranks)(*leaves, chosen), leaves, dy, create_graph=True)
    assert torch.equal(came_in[0], dy @ frozen)


@pytest.mark.parametrize("of_experts", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("of_model", ["bfloat16", "autocast"])
def test_bfloat16_stays_within_one_percent_of_float64(of_model: str, of_experts: torch.dtype) -> None:
    ranks, top_k, _ = CASES["mixed ranks"]
    leaves, chosen = problem(ranks, top_k, tokens=257)
    x, a, b, weights = (t.detach().bfloat16().float() for t in leaves)
    x, a, b = x if of_model == "autocast" else x.bfloat16(), a.to(of_experts), b.to(of_experts)
    x, a, b, weights = (t.requires_grad_() for t in (x, a, b, weights))
    wide = [t.detach().double().requires_grad_() for t in (x, a, b, weights)]
    base = frozen_linear()
    with torch.autocast("cpu", torch.bfloat16, enabled=of_model == "autocast"):
        found = around(base, ranks)(x, a, b, weights, chosen)
    exact = around(base, ranks)(*wide, chosen)
    assert found.dtype == torch.bfloat16
    dy = torch.randn_like(found)
    pairs = zip(
        [found, *torch.autograd.grad(found, [x, a, b, weights], dy)],
        [exact, *torch.autograd.grad(exact, wide, dy.double())],
        strict=True,
    )
    for name, (ours, reference) in zip(("y", *NAMES), pairs, strict=True):
        assert torch.linalg.norm(ours.double() - reference) / torch.linalg.norm(reference) < 1e-2, name


def wide_problem() -> tuple[list[Tensor], Tensor, Callable[[Tensor], Tensor]]:
    """Rows so much wider than the ranks that a row kept or made by mistake stands out; every expert has tokens."""
    tokens, wide, experts = 64, 96, len(WIDE_RANKS)
    rows = sum(WIDE_RANKS)
    leaves = [torch.randn(tokens, wide), torch.randn(rows, wide), torch.randn(wide, rows), torch.rand(tokens, experts)]
    frozen = torch.randn(wide, wide)
    chosen = torch.eye(experts, dtype=torch.bool).repeat(tokens // experts, 1)
    return [leaf.requires_grad_() for leaf in leaves], chosen, lambda x: F.linear(x, frozen)


def test_what_is_kept_for_the_backward_is_the_input_and_the_ranks() -> None:
    """x, A, B and the frozen weight are there anyway; else rank activations, gates and whose they are."""
    leaves, chosen, base = wide_problem()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base(leaves[0])
        (frozen,) = kept
        around(base, WIDE_RANKS)(*leaves, chosen)
    for known in (frozen, *(leaf.untyped_storage().data_ptr() for leaf in leaves)):
        kept.pop(known, None)
    per_pair = 4 * max(WIDE_RANKS) + 4 + 8  # activations and gate in float32, and an int64
    assert 0 < sum(kept.values()) <= int(chosen.sum()) * per_pair


class _LargeTensors(TorchDispatchMode):
    """Keeps the tensors of at least `size` elements that are made within, and so their addresses apart."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.size and out.untyped_storage().data_ptr() not in known:
            self.made[out.untyped_storage().data_ptr()] = out
        return out


def test_nothing_as_large_as_the_output_is_made() -> None:
    """Only what the frozen linear makes: its output and its input gradient."""
    leaves, chosen, base = wide_problem()
    dy = torch.randn_like(leaves[0])
    with _LargeTensors(dy.numel()) as large:
        y = around(base, WIDE_RANKS)(*leaves, chosen)
        dx = torch.autograd.grad(y, leaves, dy)[0]
    assert set(large.made) == {t.untyped_storage().data_ptr() for t in (y, dx)}
