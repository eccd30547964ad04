"""LD-MoLE's projection: the closed form, its derivatives, the intervals of lambda, and the loss made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers.naive import naive_delta, naive_sparsegen
from guilomo.layers.routers import SparsegenRouter, router_options
from guilomo.layers.routers.sparsegen import LambdaMLP, lowest_lambda, sparsegen
from guilomo.layers.routing import Place

I, E = 9, 5  # noqa: E741


def _scores(tokens: int = 31) -> tuple[Tensor, Tensor]:
    """Lambdas from nearly uniform to nearly one-hot."""
    return torch.randn(tokens, E, dtype=torch.float64), 1 - 10 ** (
        2.5 * torch.rand(tokens, 1, dtype=torch.float64) - 1.5
    )


def _router(target: int = 2) -> SparsegenRouter:
    return SparsegenRouter(I, E, 2, Place(shared=LambdaMLP(I, 7)), target=target).double()


def test_solves_the_quadratic_program() -> None:
    u, lam = _scores(12)
    for scores, one, found in zip(u.numpy(), lam[:, 0].tolist(), sparsegen(u, lam).numpy(), strict=True):
        solved = minimize(
            lambda q, u=scores, lam=one: ((q - u) ** 2).sum() - lam * (q**2).sum(),
            np.full(E, 1 / E),
            jac=lambda q, u=scores, lam=one: 2 * (q - u) - 2 * lam * q,
            method="SLSQP",
            bounds=[(0, 1)] * E,
            constraints={"type": "eq", "fun": lambda q: q.sum() - 1, "jac": lambda q: np.ones(E)},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        assert np.abs(solved.x - found).max() < 1e-7


def test_equals_the_naive_twin() -> None:
    """Outputs and both gradients, at supports of every size."""
    u, lam = _scores(200)
    u.requires_grad_()
    lam.requires_grad_()
    d_p = torch.randn(200, E, dtype=torch.float64)
    found, wanted = sparsegen(u, lam), naive_sparsegen(u, lam)
    assert set((found > 0).sum(-1).tolist()) == set(range(1, E + 1))
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    for ours, naive in zip(
        torch.autograd.grad(found, (u, lam), d_p), torch.autograd.grad(wanted, (u, lam), d_p), strict=True
    ):
        assert torch.allclose(ours, naive, rtol=1e-10, atol=1e-10)


def test_is_sparsemax_at_a_temperature() -> None:
    u, lam = _scores()
    zero = torch.zeros_like(lam)
    assert torch.allclose(sparsegen(u, lam), naive_sparsegen(u / (1 - lam), zero), rtol=1e-12, atol=1e-13)


def test_gradcheck() -> None:
    u, lam = _scores(9)
    assert torch.autograd.gradcheck(sparsegen, (u.requires_grad_(), lam.requires_grad_()), eps=1e-7, atol=1e-5)


def test_support_is_the_interval_of_lambda() -> None:
    u, lam = _scores(300)
    size = (sparsegen(u, lam) > 0).sum(-1)
    for k in range(1, E + 1):
        low = lowest_lambda(u, k)
        below = torch.full_like(low, torch.inf) if k == 1 else lowest_lambda(u, k - 1)
        inside = (low <= lam[:, 0]) & (lam[:, 0] < below)
        assert torch.equal(size == k, inside)


@pytest.mark.parametrize("lam", [-1e3, 0.0, 0.98])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_always_a_distribution(lam: float, dtype: torch.dtype) -> None:
    u = 30 * torch.randn(200, E, dtype=dtype)
    p = sparsegen(u, torch.full((200, 1), lam, dtype=dtype))
    assert torch.allclose(p.sum(-1), torch.ones(200, dtype=dtype), rtol=1e-5)
    assert (p >= 0).all()
    assert (p > 0).any(-1).all()


def test_limits() -> None:
    u = torch.randn(20, E, dtype=torch.float64)
    assert torch.allclose(
        sparsegen(u, torch.full((20, 1), -1e9).double()), torch.full((20, E), 1 / E).double(), atol=1e-7
    )
    one_hot = torch.nn.functional.one_hot(u.argmax(-1), E).double()
    apart = u.topk(2).values.diff().abs()[:, 0] > 0.02
    assert torch.equal(sparsegen(u, torch.full((20, 1), 0.99).double())[apart], one_hot[apart])


def test_shifting_all_scores_changes_nothing() -> None:
    u, lam = _scores()
    assert torch.allclose(sparsegen(u + 17, lam), sparsegen(u, lam), rtol=1e-11, atol=1e-12)


def test_beyond_the_least_temperature_lambda_has_no_gradient() -> None:
    u, lam = torch.zeros(1, E, dtype=torch.float64), torch.full((1, 1), 0.999, dtype=torch.float64, requires_grad=True)
    u[0, 0] = 0.001
    p = sparsegen(u, lam)
    assert torch.allclose(p, sparsegen(u, torch.full((1, 1), 0.99, dtype=torch.float64)), rtol=1e-12)
    assert torch.autograd.grad(p[0, 0], lam)[0].item() == 0


@pytest.mark.parametrize("target", [1, 2, E, E + 3])
def test_own_loss_is_zero_for_few_experts(target: int) -> None:
    router = _router(target)
    with torch.no_grad():
        router._held[0].up_bias.fill_(1.0)
        router.weight.mul_(4)
    routing = router(torch.randn(300, I, dtype=torch.float64))
    assert routing.penalty.shape == (300,)
    assert torch.equal(routing.penalty == 0, routing.chosen.sum(-1) <= target)
    if target < E:
        assert 0 < int((routing.penalty == 0).sum()) < 300


def test_own_loss_moves_lambda_alone() -> None:
    router = _router(1)
    x = torch.randn(20, I, dtype=torch.float64)
    grads = torch.autograd.grad(router(x).penalty.sum(), (router.weight, router._held[0].up_bias), allow_unused=True)
    assert grads[0] is None
    assert grads[1].item() < 0


def test_starts_soft() -> None:
    lam = LambdaMLP(64, 256)(torch.randn(50, 64))
    assert lam.shape == (50, 1)
    assert -2.2 < lam.mean().item() < -1.2
    assert (LambdaMLP(64, 256)(1e4 * torch.randn(50, 64)) < 0.99 + 1e-6).all()


def test_equal_experts_are_plain_lora() -> None:
    router = _router()
    x = torch.randn(11, I, dtype=torch.float64)
    a, b = torch.randn(2, I, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    delta = naive_delta(x, a.repeat(E, 1), b.repeat(1, E), router(x).weights, [2] * E, [0.5] * E)
    assert torch.allclose(delta, 0.5 * x @ a.T @ b.T, rtol=1e-12)


def test_parameters() -> None:
    """E d_in for the router; once per model and input width d h + h + h + 1."""
    options = router_options("sparsegen", {"hidden": 7})
    assert SparsegenRouter.parameters_for(E, I, **options) == E * I == sum(p.numel() for p in _router().parameters())
    assert SparsegenRouter.shared_parameters(E, I, **options) == I * 7 + 7 + 7 + 1
    assert sum(p.numel() for p in SparsegenRouter.shared(E, I, **options).parameters()) == I * 7 + 7 + 7 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0}, r"router_options\['hidden'\] = 0.*at least 1"),
        ({"target": 1.5}, r"router_options\['target'\] = 1\.5.*whole number"),
        ({"hiden": 4}, r"'hiden'.*Did you mean 'hidden'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        router_options("sparsegen", options)
