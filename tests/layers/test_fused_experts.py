"""The fused nodes equal the naive loop, outputs and gradients, and hold no more than they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.layers import ExpertLayout
from guilomo.layers.frozen_linear import Frozen
from guilomo.layers.fused import Member, expand, expand_frozen, shrink
from guilomo.layers.naive import naive_delta, naive_topk_weights
from guilomo.layers.products import MANY_TOKENS, precise_product
from guilomo.layers.routers import TopKRouter
from guilomo.layers.routing import Tokens
from mixture_cases import CASES

I, O = 13, 7  # noqa: E741  odd on purpose: nothing may rely on powers of two

FEW, MANY = 11, MANY_TOKENS + 3
"""Numbers of tokens on both sides of where router rows are stacked."""


def scales_of(ranks: tuple[int, ...]) -> tuple[float, ...]:
    return tuple(7 / rank for rank in ranks)


def leaves(tokens: int, ranks: tuple[int, ...]) -> list[Tensor]:
    """x, frozen weight, A, B, router rows."""
    shapes = ((tokens, I), (O, I), (sum(ranks), I), (O, sum(ranks)), (len(ranks), I))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=i != 1) for i, shape in enumerate(shapes)]


HOW = ("in_place", "apart", "joined")
"""How the frozen product comes to the rest: added onto in place, or not, or made by the nodes themselves."""


def fused(
    x: Tensor,
    w0: Tensor,
    a: Tensor,
    b: Tensor,
    rows: Tensor,
    ranks: tuple[int, ...],
    top_k: int,
    how: str = "in_place",
    mask: Tensor | None = None,
    n: int | None = None,
    drop: float = 0.0,
) -> Tensor:
    spread = ExpertLayout(ranks, scales_of(ranks)).to(x.dtype).spread
    frozen = Frozen(w0.detach(), None) if how == "joined" else None
    member = Member(a, rows if len(ranks) > 1 else None, frozen)
    read, [(h, logits)] = shrink(x, [member], n, drop, how == "in_place")
    routing = None if logits is None else TopKRouter(I, len(ranks), top_k).route(logits, Tokens(logits))
    if frozen is not None:
        return expand_frozen(x, frozen, h, routing, spread, mask, b, n)
    return expand(F.linear(read, w0), h, routing, spread, mask, b, n, how == "in_place")


def naive(x: Tensor, w0: Tensor, a: Tensor, b: Tensor, rows: Tensor, ranks: tuple[int, ...], top_k: int) -> Tensor:
    return x @ w0.T + naive_delta(x, a, b, naive_topk_weights(x @ rows.T, top_k), ranks, scales_of(ranks))


def assert_close(found: list[Tensor], wanted: list[Tensor], bound: float = 1e-12) -> None:
    for i, (ours, reference) in enumerate(zip(found, wanted, strict=True)):
        assert (ours - reference).abs().max() <= bound * reference.abs().max().clamp_min(1e-12), i


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_naive_loop(case: str, tokens: int, how: str) -> None:
    ranks, top_k = CASES[case]
    given = leaves(tokens, ranks)
    dy = torch.randn(tokens, O, dtype=torch.float64)
    wanted = [t for i, t in enumerate(given) if i != 1 and (i != 4 or len(ranks) > 1)]
    y, reference = fused(*given, ranks, top_k, how), naive(*given, ranks, top_k)
    found = [y, *torch.autograd.grad(y, wanted, dy)]
    assert_close(found, [reference, *torch.autograd.grad(reference, wanted, dy)])


@pytest.mark.parametrize("how", HOW)
def test_without_gradients_the_result_is_the_same(how: str) -> None:
    for tokens in (FEW, MANY):
        given = leaves(tokens, (3, 1, 5))
        with torch.no_grad():
            quiet = fused(*given, (3, 1, 5), 2, how)
        assert torch.equal(quiet, fused(*given, (3, 1, 5), 2, how))


def test_an_x_without_gradient_asks_the_frozen_linear_for_none() -> None:
    given = leaves(FEW, (3, 2))
    read, _ = shrink(given[0].detach(), [Member(given[2], given[4])], in_place=True)
    assert not read.requires_grad


def test_leading_dimensions_are_only_tokens() -> None:
    given = leaves(12, (3, 1, 5))
    y = fused(*given, (3, 1, 5), 2)
    for shape in ((3, 4), (2, 3, 2)):
        assert torch.equal(fused(given[0].view(*shape, I), *given[1:], (3, 1, 5), 2), y.view(*shape, O))


def test_no_tokens() -> None:
    given = leaves(0, (3, 2))
    y = fused(*given, (3, 2), 1)
    assert y.shape == (0, O)
    y.sum().backward()
    assert all(not given[i].grad.any() for i in (2, 3, 4))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("per_row", [False, True])
def test_second_derivatives(per_row: bool, how: str) -> None:
    """Where gradients are themselves differentiated nothing may be changed in place."""
    given = leaves(4, (2, 1))
    mask = torch.rand((2, 3) if per_row else (3,), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, a: Tensor, b: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        return fused(x.view(2, 2, I), given[1], a, b, rows, (2, 1), 2, how, mask=mask)

    inputs = (given[0], *given[2:], mask)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("how", HOW)
def test_a_gradient_that_others_hold_is_left_alone(how: str) -> None:
    """The residual stream's gradient arrives at two places; only the frozen linear's own result may be changed."""
    x, w0, a, b, rows = leaves(MANY, (3, 2))
    w0 = torch.randn(I, I, dtype=torch.float64)
    b = torch.randn(I, 5, dtype=torch.float64, requires_grad=True)
    y, again = x.sin(), x.sin()
    z = y + fused(y, w0, a, b, rows, (3, 2), 1, how)
    reference = again + naive(again, w0, a, b, rows, (3, 2), 1)
    dy = torch.randn_like(z)
    kept = dy.clone()
    assert_close(list(torch.autograd.grad(z, (x, a, b), dy)), list(torch.autograd.grad(reference, (x, a, b), dy)))
    assert torch.equal(dy, kept)


@pytest.mark.parametrize("how", HOW)
def test_dropout_is_the_same_in_the_backward_and_is_not_saved(how: str) -> None:
    """The loss is linear in A for given gates, so ``loss = <A, dA>`` only if both passes drop the same entries."""
    x, w0, a, b, _ = leaves(MANY, (4,))
    with torch.no_grad():
        whole = fused(x, torch.zeros_like(w0), a, b, None, (4,), 1)
    y = fused(x, torch.zeros_like(w0), a, b, None, (4,), 1, how, drop=0.5)
    d_x, d_a = torch.autograd.grad((y * y.detach()).sum(), (x, a))
    assert torch.allclose((d_a * a).sum(), y.detach().square().sum(), rtol=1e-12)
    assert torch.allclose((d_x * x).sum(), y.detach().square().sum(), rtol=1e-12)
    assert (d_x == 0).double().mean() == pytest.approx(0.5, abs=0.06)
    assert not torch.allclose(y, whole)


def test_dropout_is_repeatable_and_on_average_changes_nothing() -> None:
    x, w0, a, b, rows = leaves(5, (3, 2))
    runs = []
    for seed in (0, 0, *range(1, 400)):
        torch.manual_seed(seed)
        runs.append(fused(x, w0, a, b, rows, (3, 2), 2, drop=0.3).detach())
    assert torch.equal(runs[0], runs[1])
    whole = fused(x, w0, a, b, rows, (3, 2), 2).detach()
    error = torch.stack(runs).mean(0) - whole
    assert (error.abs() < 5 * torch.stack(runs).std(0) / len(runs) ** 0.5).all()


@pytest.mark.parametrize("how", HOW)
def test_saves_x_and_what_is_as_wide_as_ranks_and_experts(how: str) -> None:
    tokens, ranks = 500, (3, 2)
    given = leaves(tokens, ranks)
    parameters = {t.untyped_storage().data_ptr() for t in given}
    saved: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = fused(*given, ranks, 1, how)
    spread = len(ranks) * sum(ranks)
    # h and logits share a buffer; top-1 keeps probabilities and two masks of the width of the experts.
    assert sum(saved.values()) <= 8 * (tokens * (sum(ranks) + 5 * len(ranks)) + spread)
    assert y.requires_grad


@pytest.mark.parametrize("width", [64, 1024])
def test_half_precision_logits_are_as_good_as_float32(width: int) -> None:
    x, w = torch.randn(777, width).bfloat16(), torch.randn(8, width).bfloat16() / width**0.5
    exact = x.double() @ w.double().T
    found = precise_product(x, w)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 2**-15 * exact.abs().max()
    assert ((x @ w.T).double() - exact).abs().max() > 2**-10 * exact.abs().max()  # what it is there to avoid
    assert torch.equal(found.topk(2).indices.sort().values, exact.topk(2).indices.sort().values)


def test_linears_of_one_x_share_a_shrink() -> None:
    """Of three linears one is joined, one called, one has a single expert; they equal three alone."""
    given = {"joined": (leaves(MANY, (3, 2)), (3, 2)), "in_place": (leaves(MANY, (2, 1, 4)), (2, 1, 4))}
    given["apart"] = (leaves(MANY, (6,)), (6,))
    x = given["joined"][0][0]
    frozen = {how: Frozen(t[1].detach(), None) if how == "joined" else None for how, (t, _) in given.items()}
    members = [Member(t[2], t[4] if len(r) > 1 else None, frozen[how]) for how, (t, r) in given.items()]
    read, shrunk = shrink(x, members, in_place=True)
    ys, alone = [], []
    for (how, (t, ranks)), (h, logits) in zip(given.items(), shrunk, strict=True):
        routing = None if logits is None else TopKRouter(I, len(ranks), 1).route(logits, Tokens(logits))
        spread = ExpertLayout(ranks, scales_of(ranks)).to(x.dtype).spread
        if how == "joined":
            ys.append(expand_frozen(x, frozen[how], h, routing, spread, None, t[3], None))
        else:
            ys.append(expand(F.linear(read, t[1]), h, routing, spread, None, t[3], None, how == "in_place"))
        alone.append(fused(x, *t[1:], ranks, 1))
    wanted = [x, *(t[i] for t, ranks in given.values() for i in ((2, 3, 4) if len(ranks) > 1 else (2, 3)))]
    dys = [torch.randn_like(y) for y in ys]
    found, reference = (list(torch.autograd.grad(outputs, wanted, dys)) for outputs in (ys, alone))
    assert_close([*ys, *found], [*alone, *reference])


def test_a_gradient_handed_over_in_one_backward_is_not_used_in_another() -> None:
    x, w0, a, b, rows = leaves(MANY, (3, 2))
    frozen = Frozen(w0, None)
    _, [(h, logits)] = shrink(x, [Member(a, rows, frozen)])
    spread = ExpertLayout((3, 2), scales_of((3, 2))).to(x.dtype).spread
    y = expand_frozen(x, frozen, h, TopKRouter(I, 2, 2).route(logits, Tokens(logits)), spread, None, b, None)
    torch.autograd.grad(y.sum(), b, retain_graph=True)  # stops at the second node
    (found,) = torch.autograd.grad(logits.square().sum(), x)
    (wanted,) = torch.autograd.grad((x @ rows.T).square().sum(), x)
    assert_close([found], [wanted])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_half_precision_stays_within_one_percent(base: torch.dtype, adapter: torch.dtype, how: str) -> None:
    if how == "joined" and base != adapter:
        pytest.skip("joined only where all is of one dtype")
    ranks = (3, 8, 1, 5)
    exact = [t.detach().bfloat16().double().requires_grad_() for t in leaves(MANY, ranks)]
    given = [t.detach().to(base if i < 2 else adapter).requires_grad_(i != 1) for i, t in enumerate(exact)]
    y = fused(*given, ranks, 4, how)
    assert y.dtype == base
    reference = fused(*exact, ranks, 4, how)
    kept = (0, 2, 3, 4)
    dy = torch.randn_like(reference).bfloat16()
    found = [y, *torch.autograd.grad(y, [given[i] for i in kept], dy.to(base))]
    wanted = [reference, *torch.autograd.grad(reference, [exact[i] for i in kept], dy.double())]
    for i, (ours, better) in enumerate(zip(found, wanted, strict=True)):
        assert torch.linalg.norm(ours.double() - better) < 2e-2 * torch.linalg.norm(better), i
    for i in kept:
        assert torch.autograd.grad(fused(*given, ranks, 4, how).float().sum(), given[i])[0].dtype == given[i].dtype


def test_autocast_computes_in_half_precision_and_returns_gradients_of_the_parameters_dtype() -> None:
    given = [t.detach().float().requires_grad_(i != 1) for i, t in enumerate(leaves(MANY, (3, 2)))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fused(*given, (3, 2), 2)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), [given[i] for i in (0, 2, 3, 4)])
    assert all(g.dtype == torch.float32 for g in gradients)
    exact = fused(*[t.double() for t in given], (3, 2), 2)
    assert torch.linalg.norm(y.double() - exact) < 2e-2 * torch.linalg.norm(exact)
