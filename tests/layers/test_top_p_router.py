"""Routing by probability mass: the published rule, its limits, and what the entropy loss does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers import balance_loss, router_statistics
from guilomo.layers.balance import read_by
from guilomo.layers.naive import naive_delta
from guilomo.layers.routers import TopPRouter, router_options

I, E = 9, 5  # noqa: E741


def _router(mass: float, renormalize: str = "never") -> TopPRouter:
    router = TopPRouter(I, E, 2, mass=mass, renormalize=renormalize).double()
    with torch.no_grad():
        router.weight.mul_(3)
    return router


def _kept(p: Tensor, mass: float) -> list[int]:
    """Experts in descending order until their mass reaches `mass`; at least one."""
    order = sorted(range(E), key=lambda e: (-float(p[e]), e))
    kept, total = [], 0.0
    for e in order:
        if kept and total >= mass:
            break
        kept.append(e)
        total += float(p[e])
    return kept


@pytest.mark.parametrize("renormalize", ["never", "top_p"])
@pytest.mark.parametrize("mass", [0.0, 0.3, 0.4, 0.8, 1.0])
def test_is_the_published_rule(mass: float, renormalize: str) -> None:
    router = _router(mass, renormalize)
    x = torch.randn(60, I, dtype=torch.float64, requires_grad=True)
    found, rows = router(x), []
    for token in x:
        p = (router.weight @ token).softmax(0)
        kept = _kept(p.detach(), mass) if mass < 1 else list(range(E))
        only = torch.stack([p[e] if e in kept else torch.zeros_like(p[e]) for e in range(E)])
        rows.append(only / only.sum() if renormalize == "top_p" else only)
    wanted = torch.stack(rows)
    assert torch.allclose(found.weights, wanted, rtol=1e-12, atol=0)
    assert torch.equal(found.chosen, wanted > 0)
    reads = torch.randn(60, E, dtype=torch.float64)
    ours, naive = (torch.autograd.grad((w * reads).sum(), (x, router.weight)) for w in (found.weights, wanted))
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-12) for one, other in zip(ours, naive, strict=True))


def test_limits() -> None:
    x = torch.randn(50, I, dtype=torch.float64)
    one = _router(0.0)
    routing = one(x)
    assert torch.equal(routing.chosen.sum(-1), torch.ones(50, dtype=torch.int64))
    assert torch.equal(routing.weights.amax(-1), routing.probabilities.amax(-1))
    all_of_them = _router(1.0)(x)
    assert all_of_them.chosen.all()
    assert torch.equal(all_of_them.weights, all_of_them.probabilities)
    a, b = torch.randn(2 * E, I, dtype=torch.float64), torch.randn(4, 2 * E, dtype=torch.float64)
    dense = sum(
        all_of_them.probabilities[:, e : e + 1] * (x @ a[2 * e : 2 * e + 2].T @ b[:, 2 * e : 2 * e + 2].T)
        for e in range(E)
    )
    assert torch.allclose(naive_delta(x, a, b, all_of_them.weights, [2] * E, [1.0] * E), dense, rtol=1e-12, atol=1e-13)


def test_more_mass_keeps_more_and_no_more_than_needed() -> None:
    x = torch.randn(200, I, dtype=torch.float64)
    router, before = _router(0.0), torch.zeros(200, dtype=torch.int64)
    for mass in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0):
        router.mass = mass
        routing = router(x)
        size = routing.chosen.sum(-1)
        assert (size >= before).all()
        before = size
        if 0 < mass < 1:
            kept = routing.probabilities * routing.chosen
            assert (kept.sum(-1) >= mass).all()
            last = torch.where(routing.chosen, routing.probabilities, torch.inf).amin(-1)
            assert ((kept.sum(-1) - last)[size > 1] < mass).all()


def test_ties_go_to_the_lowest_index() -> None:
    router = _router(0.5)
    with torch.no_grad():
        router.weight.zero_()
    assert router(torch.randn(2, I, dtype=torch.float64)).chosen[0].tolist() == [True, True, True, False, False]


def test_own_loss_is_the_entropy() -> None:
    router = _router(0.4)
    with torch.no_grad():
        router.weight.zero_()
    assert router(torch.randn(3, I, dtype=torch.float64)).penalty.tolist() == pytest.approx([math.log(E)] * 3)
    with torch.no_grad():
        router.weight[0].fill_(1e4)
    assert router(torch.ones(3, I, dtype=torch.float64)).penalty.abs().max() < 1e-12


def test_less_entropy_is_fewer_experts() -> None:
    router, x = TopPRouter(I, E, 2, mass=0.6).double(), torch.randn(100, I, dtype=torch.float64)
    optimizer, sizes = torch.optim.SGD(router.parameters(), lr=1.0), []
    for _ in range(60):
        routing = router(x)
        sizes.append(routing.chosen.double().sum(-1).mean().item())
        optimizer.zero_grad()
        routing.penalty.mean().backward()
        optimizer.step()
    assert sizes[-1] < 0.7 * sizes[0]


def test_its_balance_loss_counts_kept_sets() -> None:
    """E sum f Q with f_e the share of tokens whose kept set has e: f sums to the mean kept count, not to 1."""
    routing = _router(0.6)(torch.randn(30, I, dtype=torch.float64))
    found = balance_loss("switch_per_slot", router_statistics(routing, None, read_by("switch_per_slot", False)))
    f, q = routing.chosen.double().mean(0), routing.probabilities.mean(0)
    assert found.item() == pytest.approx(E * (f * q).sum().item(), rel=1e-12)
    assert f.sum() > 1


def test_parameters() -> None:
    assert TopPRouter.parameters_for(E, I) == E * I == sum(p.numel() for p in _router(0.4).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mass": 1.1}, r"mass'\] = 1\.1.*at most 1"), ({"renormalize": "topp"}, r"Did you mean 'top_p'")],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        router_options("top_p", options)
