"""Selective Sinkhorn routing: marginals, invariances, and that it is the plain router whenever it is not selected."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers.naive import naive_topk_weights
from guilomo.layers.routers import SinkhornRouter, TopKRouter, router_options
from guilomo.layers.routers.sinkhorn import sinkhorn
from guilomo.layers.routing import Tokens

I, E = 9, 4  # noqa: E741


def _cost(tokens: int = 30) -> Tensor:
    return torch.randn(tokens, E, dtype=torch.float64)


def _router(**options: object) -> SinkhornRouter:
    return SinkhornRouter(I, E, 2, **{"q": 1.0, "xi": 0.5, **options}).double().train()


def test_marginals() -> None:
    pi = sinkhorn(_cost(), 0.5, iterations=2000, tolerance=1e-12)
    assert torch.allclose(pi.sum(-1), torch.ones(30, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(pi.sum(0), torch.full((E,), 30 / E, dtype=torch.float64), rtol=1e-8)


def test_is_the_naive_iteration() -> None:
    """Plain products at a moderate xi, in the order v then u."""
    cost = _cost()
    kernel, u = (cost / 0.7).exp(), None
    u = 1 / kernel.sum(1)
    for _ in range(30):
        v = 30 / E / (kernel.T @ u)
        u = 1 / (kernel @ v)
    assert torch.allclose(sinkhorn(cost, 0.7, None, 30, 0.0), u[:, None] * kernel * v, rtol=1e-9)


def test_constants_of_rows_and_columns_change_nothing() -> None:
    cost = _cost()
    moved = cost + torch.randn(30, 1, dtype=torch.float64) + torch.randn(E, dtype=torch.float64)
    options = {"iterations": 3000, "tolerance": 1e-13}
    assert torch.allclose(sinkhorn(moved, 0.5, **options), sinkhorn(cost, 0.5, **options), rtol=1e-8)


def test_limits() -> None:
    assert torch.allclose(sinkhorn(_cost(), 1e6), torch.full((30, E), 1 / E).double(), atol=1e-5)
    square = torch.randn(6, 6, dtype=torch.float64)
    rows, columns = linear_sum_assignment(square.numpy(), maximize=True)
    found = sinkhorn(square, 0.01, iterations=20000, tolerance=1e-10).argmax(-1)
    assert found[rows].tolist() == columns.tolist()


def test_padding_has_no_part() -> None:
    cost, real = _cost(), torch.ones(30, dtype=torch.bool)
    real[[3, 17, 29]] = False
    found = sinkhorn(cost, 0.5, real, 50, 0.0)
    assert torch.allclose(found[real], sinkhorn(cost[real], 0.5, None, 50, 0.0), rtol=1e-10)
    router = _router()
    logits = _cost().view(3, 10, E)
    mask = real.view(3, 10)
    other = torch.where(mask[..., None], logits, 50 * torch.randn_like(logits))
    x = torch.zeros(3, 10, I)
    found, same = (router.route(u, Tokens(x, mask)).weights for u in (logits, other))
    assert torch.equal(found[mask], same[mask])
    assert torch.allclose(same[~mask], naive_topk_weights(other[~mask], 2), rtol=1e-12)


@pytest.mark.parametrize("cost", ["softmax", "linear"])
def test_takes_the_largest_of_the_assignment(cost: str) -> None:
    """Experts and weights both, renormalised."""
    router, logits = _router(cost=cost), _cost()
    routing = router.route(logits, Tokens(torch.zeros(30, I)))
    pi = sinkhorn(logits.softmax(-1) if cost == "softmax" else logits, 0.5)
    values, kept = pi.topk(2, -1)
    wanted = torch.zeros_like(pi).scatter(-1, kept, values / values.sum(-1, keepdim=True))
    assert torch.allclose(routing.weights, wanted, rtol=1e-12)
    assert torch.equal(routing.chosen, wanted > 0)


def test_the_kept_weights_are_the_nearest_of_so_few_experts() -> None:
    """Of all distributions over K experts, these have the least KL divergence from the assignment: -log of its mass."""
    logits = _cost(12)
    routing = _router(cost="linear").route(logits, Tokens(torch.zeros(12, I)))
    pi = sinkhorn(logits, 0.5)
    shares = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    others = torch.stack([shares, 1 - shares], dim=-1)
    for row, weights, chosen in zip(pi / pi.sum(-1, keepdim=True), routing.weights, routing.chosen, strict=True):
        ours = (weights[chosen] * (weights[chosen] / row[chosen]).log()).sum()
        assert ours.item() == pytest.approx(-math.log(row[chosen].sum().item()), rel=1e-9)
        for pair in itertools.combinations(range(E), 2):
            divergences = (others * (others / row[list(pair)]).log()).sum(-1)
            assert (divergences >= ours - 1e-9).all()


def test_gradients() -> None:
    logits = _cost().requires_grad_()
    detached = _router().route(logits, Tokens(torch.zeros(30, I)))
    assert not detached.weights.requires_grad
    router = _router(grad="unroll", iterations=20, tolerance=0.0)
    some = _cost(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: router.route(u, Tokens(torch.zeros(5, I))).weights, some, atol=1e-5)


@pytest.mark.parametrize(("q", "training"), [(0.0, True), (1.0, False)])
def test_otherwise_it_is_the_plain_router(q: float, training: bool) -> None:
    """To the bit, and no random number is drawn."""
    router = _router(q=q).train(training)
    plain = TopKRouter(I, E, 2).double()
    plain.load_state_dict(router.state_dict())
    x = torch.randn(7, I, dtype=torch.float64)
    state = torch.get_rng_state()
    assert torch.equal(router(x).weights, plain(x).weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_coin_is_drawn_with_its_chance_and_repeats_with_its_seed() -> None:
    router = _router(q=0.25)
    x = torch.randn(7, I, dtype=torch.float64)
    plain = TopKRouter.route(router, router.logits(x), Tokens(x)).weights

    def sides() -> list[bool]:
        torch.manual_seed(3)
        return [not torch.equal(router(x).weights, plain) for _ in range(400)]

    first = sides()
    assert 70 <= sum(first) <= 130
    assert first == sides()


def test_balanced_marginals_do_not_balance_the_choices() -> None:
    """Why loads are reported, and not read off the assignment."""
    logits = _cost(200)
    load = _router(cost="linear").route(logits, Tokens(torch.zeros(200, I))).chosen.sum(0)
    assert torch.allclose(sinkhorn(logits, 0.5).sum(0), torch.full((E,), 200 / E, dtype=torch.float64), rtol=1e-3)
    assert load.max() - load.min() > 5


def test_a_collapsed_router_spreads_its_load() -> None:
    router = _router(cost="linear", xi=1.0)
    logits = _cost(400) + torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    tokens = Tokens(torch.zeros(400, I))
    balanced, collapsed = (r.route(logits, tokens).weights.sum(0) for r in (router, TopKRouter(I, E, 2)))
    assert balanced.std() / balanced.mean() < 0.3 * (collapsed.std() / collapsed.mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 1.5}, r"q'\] = 1\.5.*at most 1"),
        ({"xi": 0.0}, r"xi'\] = 0\.0.*above 0"),
        ({"cost": "logits"}, r"cost'\] = 'logits'.*linear, softmax"),
        ({"grad": "none"}, r"grad'\].*detach, unroll"),
        ({"iterations": 0}, r"iterations'\] = 0.*at least 1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        router_options("sinkhorn", options)
