"""AdaMoLE: the published formula, its guarantee, and the guard where it has none."""

from __future__ import annotations

import pytest
import torch

from guilomo.errors import GuilomoError
from guilomo.layers.routers import ThresholdRouter, router_options

I, E = 9, 5  # noqa: E741


def _router(scale: float = 3.0, **options: object) -> ThresholdRouter:
    router = ThresholdRouter(I, E, 2, **options).double()
    with torch.no_grad():
        router.weight.mul_(scale)
        router.threshold_bias.fill_(0.3)
    return router


@pytest.mark.parametrize("max_threshold", [None, 0.1, 0.0])
def test_is_the_published_formula(max_threshold: float | None) -> None:
    router = _router(max_threshold=max_threshold)
    x = torch.randn(40, I, dtype=torch.float64, requires_grad=True)
    found = router(x)
    rows = []
    for token in x:
        g = (router.weight @ token).softmax(0)
        logit = router.threshold[0] @ token + router.threshold_bias[0]
        tau = (1 / E if max_threshold is None else max_threshold) * torch.sigmoid(logit)
        above = torch.stack([(v - tau) if v > tau else torch.zeros_like(v) for v in g])
        rows.append(above / above.sum())
    wanted = torch.stack(rows)
    assert torch.allclose(found.weights, wanted, rtol=1e-12, atol=1e-14)
    assert torch.equal(found.chosen, wanted > 0)
    sizes = set(found.chosen.sum(-1).tolist())
    assert sizes == {E} if max_threshold == 0 else len(sizes) > 2
    leaves = [x, router.weight, *((router.threshold, router.threshold_bias) if max_threshold != 0 else ())]
    reads = torch.randn(40, E, dtype=torch.float64)
    ours, naive = (torch.autograd.grad((w * reads).sum(), leaves) for w in (found.weights, wanted))
    for one, other in zip(ours, naive, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    router = _router()
    x = torch.randn(4, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: router(x).weights, x, eps=1e-7, atol=1e-5)


def test_no_token_is_empty() -> None:
    routing = _router(scale=0.01)(torch.randn(500, I, dtype=torch.float64))
    assert routing.chosen.any(-1).all()
    assert torch.allclose(routing.weights.sum(-1), torch.ones(500, dtype=torch.float64), rtol=1e-9)


def test_exact_ties_at_the_threshold_share_evenly() -> None:
    """Without a guard 0 / 0: all g equal 1/E and tau equal to them, which takes sigmoid = 1."""
    router = _router()
    with torch.no_grad():
        router.weight.zero_()
        router.threshold.zero_()
        router.threshold_bias.fill_(100.0)
    x = torch.randn(3, I, dtype=torch.float64, requires_grad=True)
    routing = router(x)
    assert torch.equal(routing.weights, torch.full((3, E), 1 / E, dtype=torch.float64))
    assert routing.chosen.all()
    routing.weights.square().sum().backward()
    assert x.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()


def test_weights_stay_non_negative_in_the_balance_loss() -> None:
    """The released code lets negative g - tau into it."""
    assert (_router()(torch.randn(50, I, dtype=torch.float64)).weights >= 0).all()


def test_parameters() -> None:
    assert ThresholdRouter.parameters_for(E, I) == E * I + I + 1 == sum(p.numel() for p in _router().parameters())


def test_a_threshold_that_could_leave_tokens_empty_is_refused() -> None:
    with pytest.raises(GuilomoError, match=r"max_threshold'\] = 0\.3.*at most 1/5"):
        _router(max_threshold=0.3)
    with pytest.raises(GuilomoError, match=r"max_threshold'\] = 0\.6.*at most 0\.5"):
        router_options("threshold", {"max_threshold": 0.6})
