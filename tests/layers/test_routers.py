"""The routers: definitions, gradients, dtypes, and the traps of top-1 and of a zero start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers import ExpertLayout, packed_delta, router_class
from guilomo.layers.naive import naive_topk_weights
from guilomo.layers.routers import ROUTERS, DenseRouter, FixedRouter, TopKRouter, router_options
from guilomo.layers.routing import Place, Tokens
from router_cases import CASES

I, E = 9, 5  # noqa: E741
NONE = Tokens(torch.empty(0))
"""These routers read nothing of them."""


@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_topk_is_the_published_formula(top_k: int) -> None:
    router = TopKRouter(I, E, top_k).double()
    x = torch.randn(31, I, dtype=torch.float64)
    routing = router(x)
    wanted = naive_topk_weights(x @ router.weight.T, top_k)
    assert torch.allclose(routing.weights, wanted, rtol=1e-13, atol=0)
    assert torch.equal(routing.chosen, wanted > 0)
    assert torch.equal(routing.chosen.sum(-1), torch.full((31,), top_k))
    assert torch.allclose(routing.probabilities, (x @ router.weight.T).softmax(-1), rtol=1e-13, atol=0)
    if top_k > 1:
        assert torch.allclose(routing.weights.sum(-1), torch.ones(31, dtype=torch.float64), rtol=1e-13)


def test_dense_chooses_everyone() -> None:
    router = DenseRouter(I, E, top_k=1)
    routing = router(torch.randn(4, I))
    assert router.top_k == E
    assert routing.chosen.all()
    assert torch.equal(routing.weights, routing.probabilities)


def test_fixed_ignores_the_token() -> None:
    router = FixedRouter(I, 3, 3, weights=[0.5, 0.25, 1.0])
    weights = router(torch.randn(2, 4, I)).weights
    assert weights.shape == (2, 4, 3)
    assert torch.allclose(weights, torch.tensor([0.5, 0.25, 1.0]).expand(2, 4, 3), rtol=1e-6)
    assert torch.allclose(FixedRouter(I, 3, 3)(torch.randn(1, I)).weights, torch.full((1, 3), 1 / 3))
    assert list(router.parameters()) == []
    assert router.state_dict() == {}


def test_fixed_weights_survive_casts_exactly() -> None:
    router = FixedRouter(I, 3, 3, weights=[0.1, 0.3, 0.6])
    before = router(torch.randn(1, I)).weights
    assert torch.equal(router.bfloat16()(torch.randn(1, I)).weights, before)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.5, 0.0], [1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [], 1])
def test_fixed_refuses_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(GuilomoError, match=r"weights.*(3 )?positive numbers"):
        FixedRouter(I, 3, 3, weights=weights)


def test_unknown_router_proposes_the_nearest() -> None:
    with pytest.raises(GuilomoError, match=r"router = 'topq'.*dense, fixed, .*topk.*'topk'"):
        router_class("topq")


@pytest.mark.parametrize(("kind", "top_k"), [(TopKRouter, 1), (TopKRouter, 2), (TopKRouter, E), (DenseRouter, E)])
def test_gradcheck(kind: type[TopKRouter], top_k: int) -> None:
    router = kind(I, E, top_k).double()
    x = torch.randn(4, I, dtype=torch.float64, requires_grad=True)

    def weights(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        routing = torch.func.functional_call(router, {"weight": weight}, (x,))
        return routing.weights, routing.probabilities

    assert torch.autograd.gradcheck(weights, (x, router.weight))


@pytest.mark.parametrize("name", sorted(set(ROUTERS) - {"fixed", "flylora"}))
def test_every_router_has_the_gradients_of_finite_differences(name: str) -> None:
    """Weights and the router's own loss, by x and all parameters, shared ones too. (Two routers have no gradient.)"""
    experts = 3
    chosen = {**CASES[name].get("router_options", {}), **({"grad": "unroll"} if name == "sinkhorn" else {})}
    kind, options = ROUTERS[name], router_options(name, chosen)
    shared = None if kind.shared_key(experts, I) is None else kind.shared(experts, I, **options).double()
    router = kind(I, experts, 2, Place(0.5, shared), **options).double().train()
    parameters = [*router.parameters(), *([] if shared is None else shared.parameters())]
    for p in parameters:
        torch.nn.init.normal_(p, std=0.5)
    x = torch.randn(4, I, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        routing = router.route(router.logits(x), Tokens(x, task=torch.tensor([2, 0, 1, 1])))
        found = routing.weights, routing.penalty
        return tuple(t for t in found if t is not None and t.requires_grad)

    assert outputs(x)
    assert torch.autograd.gradcheck(outputs, (x, *parameters), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("kind", [TopKRouter, DenseRouter])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_for_half_precision(kind: type[TopKRouter], dtype: torch.dtype) -> None:
    """The logits must be those of float32 arithmetic, not half-precision ones cast up afterwards."""
    router = kind(I, E, 2).to(dtype)
    x = torch.randn(64, I).to(dtype)
    wanted = x.float() @ router.weight.float().T
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            routing = router(x)
        assert routing.logits.dtype == torch.float32
        assert routing.weights.dtype == torch.float32
        assert torch.allclose(routing.logits, wanted, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_touch_float32_logits() -> None:
    router, x = TopKRouter(I, E, 2), torch.randn(64, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x).logits
    assert torch.equal(inside, router(x).logits)


def test_ties_go_to_the_lowest_index() -> None:
    router = TopKRouter(I, E, 2)
    chosen = router.route(torch.zeros(3, E), NONE).chosen
    assert chosen[0].tolist() == [True, True, False, False, False]
    late = router.route(torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]]), NONE).chosen
    assert late[0].tolist() == [False, True, False, True, False]
    # Unstable sorts give ties away only when there are many.
    many = TopKRouter(I, 300, 7).route((torch.arange(300) % 3 == 1).float().expand(5, 300), NONE).chosen
    assert all(row.nonzero().flatten().tolist() == [1, 4, 7, 10, 13, 16, 19] for row in many)


def test_top1_keeps_a_router_gradient() -> None:
    """Renormalising a single kept probability gives w / w = 1: no gradient at all would reach the router.

    That is why the weight of top-1 is the probability itself. The renormalised form, a softmax over the one kept
    logit, is shown beside it: its gradient is exactly 0.
    """
    router = TopKRouter(I, E, 1).double()
    x, reads = torch.randn(8, I, dtype=torch.float64), torch.randn(8, E, dtype=torch.float64)
    routing = router(x)
    (ours,) = torch.autograd.grad((routing.weights * reads).sum(), router.weight)
    assert ours.abs().max() > 1e-3
    logits = router.logits(x)
    renormalised = logits.masked_fill(~routing.chosen, float("-inf")).softmax(-1)
    (theirs,) = torch.autograd.grad((renormalised * reads).sum(), router.weight)
    assert torch.equal(theirs, torch.zeros_like(theirs))


def test_a_zero_start_gives_the_router_no_task_gradient() -> None:
    """With B = 0 the output does not depend on the gate: only auxiliary losses move the router on the first step."""
    ranks = (2, 3, 1)
    router = TopKRouter(I, 3, 2).double()
    a = torch.randn(6, I, dtype=torch.float64, requires_grad=True)
    spread = ExpertLayout(ranks, (1.0, 2.0, 3.0)).double().spread
    x = torch.randn(8, I, dtype=torch.float64)
    for b, zero in ((torch.zeros(4, 6), True), (torch.ones(4, 6), False)):
        y = packed_delta(x, a, b.double(), router(x).weights, spread)
        d_router, d_a = torch.autograd.grad((y * torch.randn_like(y)).sum(), (router.weight, a))
        assert (d_router.abs().max() == 0) == zero
        assert (d_a.abs().max() == 0) == zero


def test_parameters_for_counts_what_is_made() -> None:
    for kind in (TopKRouter, DenseRouter, FixedRouter):
        made = sum(p.numel() for p in kind(I, E, 2).parameters())
        assert kind.parameters_for(E, I) == made


@pytest.mark.parametrize("tokens", [3, 70])
def test_blocked_experts_are_not_chosen_twice(tokens: int) -> None:
    """All experts but one are at -inf: there is a second one all the same, of weight 0."""
    for alone in range(3):
        logits = torch.full((tokens, 3), float("-inf"), dtype=torch.float64)
        logits[:, alone] = 0.5
        routing = TopKRouter(4, 3, 2).route(logits, Tokens(logits))
        assert routing.chosen.sum(-1).eq(2).all()
        assert torch.equal(routing.weights, (torch.arange(3) == alone).double().expand(tokens, 3))
