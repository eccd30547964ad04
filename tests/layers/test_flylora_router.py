"""FlyLoRA: the frozen projection, and the three rules by which its activations choose ranks."""

from __future__ import annotations

import pytest
import torch

from guilomo.errors import GuilomoError
from guilomo.layers.frozen import SparseGaussian
from guilomo.layers.routers import FlyLoraRouter, router_options
from guilomo.layers.routing import Tokens

I, R, K = 40, 32, 8  # noqa: E741


def _chosen(score: str, h: torch.Tensor, bias: float = 0.3) -> torch.Tensor:
    router = FlyLoraRouter(I, R, K, score=score).double()
    router.bias = bias * torch.randn(R, generator=torch.Generator().manual_seed(1)).double()
    routing = router.route(router.logits(h), Tokens(h))
    assert torch.equal(routing.weights, routing.chosen.double()), "gates are 0 or 1"
    wanted = {"signed": h + router.bias, "abs": h.abs() + router.bias, "abs_after_bias": (h + router.bias).abs()}[score]
    kept = wanted.topk(K, -1).indices
    assert torch.equal(routing.chosen, torch.zeros_like(h, dtype=torch.bool).scatter(-1, kept, True))
    return routing.chosen


def test_the_three_rules_are_different_methods() -> None:
    h = torch.randn(500, R, dtype=torch.float64)
    signed, magnitude, after = (_chosen(score, h) for score in ("signed", "abs", "abs_after_bias"))
    assert not torch.equal(magnitude, after)
    plain, absolute = _chosen("signed", h, bias=0.0), _chosen("abs", h, bias=0.0)
    agreement = (plain & absolute).sum() / (500 * K)
    assert 0.4 < agreement < 0.6, "about half of the ranks, on Gaussian activations"
    assert torch.equal(_chosen("abs_after_bias", h, bias=0.0), absolute)
    assert signed.sum() == 500 * K


def test_selection_has_no_gradient() -> None:
    h = torch.randn(5, R, requires_grad=True)
    router = FlyLoraRouter(I, R, K)
    routing = router.route(router.logits(h), Tokens(h))
    assert not routing.weights.requires_grad
    assert not routing.logits.requires_grad
    assert list(router.parameters()) == []
    assert set(router.state_dict()) == {"bias"}


def test_the_projection_is_a_function_of_seed_and_name() -> None:
    recipe = FlyLoraRouter.frozen_rows("a.b", I, R, K, **router_options("flylora", {"seed": 7}))
    assert torch.equal(recipe(), recipe())
    assert torch.equal(recipe(), SparseGaussian(7, "a.b", R, I, 10, 1 / R)())
    others = [SparseGaussian(8, "a.b", R, I, 10, 1 / R), SparseGaussian(7, "a.c", R, I, 10, 1 / R)]
    assert not any(torch.equal(recipe(), other()) for other in others)
    state = torch.get_rng_state()
    recipe()
    assert torch.equal(torch.get_rng_state(), state), "no other random number is touched"


def test_the_projection_is_the_same_everywhere() -> None:
    """A value that was once computed: other machines and versions must find it."""
    a = SparseGaussian(0, "model.layers.0.q_proj", 2, 6, 2, 0.5)()
    assert a.tolist() == GOLDEN


GOLDEN = [[0.0, 0.0, 0.0, -0.0213623046875, 0.0, -0.55859375], [0.0341796875, 0.0, 0.0, 0.0, 0.0, 0.25390625]]


def test_the_projection_has_the_published_statistics() -> None:
    a = SparseGaussian(3, "x", 64, 512, 128, 1 / 64)()
    assert ((a != 0).sum(1) == 128).all()
    assert torch.allclose(a[a != 0].std(), torch.tensor(1 / 64), rtol=0.03)
    assert ((a != 0).sum(0) > 4).all(), "places are spread over the columns"
    assert torch.equal(a, a.bfloat16().float()), "no precision changes it"


def test_independent_projections_are_orthogonal_on_average() -> None:
    products = [
        SparseGaussian(s, "x", 16, 200, 50, 1.0)() @ SparseGaussian(s, "y", 16, 200, 50, 1.0)().T for s in range(60)
    ]
    mean = torch.stack(products).mean(0)
    assert mean.abs().mean() < 0.2 * torch.stack(products).abs().mean()


def test_the_share_of_nonzeros_is_that_of_the_chosen_ranks() -> None:
    assert FlyLoraRouter.frozen_rows("m", I, R, K, **router_options("flylora", {})).nonzeros == I * K // R
    assert FlyLoraRouter.frozen_rows("m", I, R, K, **router_options("flylora", {"nonzeros": 3})).nonzeros == 3
    with pytest.raises(GuilomoError, match=r"nonzeros'\] = 41.*at most the 40 features of module 'm'"):
        FlyLoraRouter.frozen_rows("m", I, R, K, **router_options("flylora", {"nonzeros": 41}))


def test_averages_of_adapters_with_one_projection_are_exact() -> None:
    """Where all ranks are chosen the mean of B_t A is (mean B_t) A; with different A it is not."""
    a = SparseGaussian(0, "m", R, I, 10, 1 / R)().double()
    other = SparseGaussian(1, "m", R, I, 10, 1 / R)().double()
    b = torch.randn(4, 3, R, dtype=torch.float64)
    assert torch.allclose((b @ a).mean(0), b.mean(0) @ a, rtol=1e-12, atol=1e-14)
    mixed = (b[0] @ a + b[1] @ other) / 2
    averaged = b[:2].mean(0) @ ((a + other) / 2)
    assert (mixed - averaged).norm() > 0.3 * mixed.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "absolute"}, r"score'\] = 'absolute'.*abs, abs_after_bias, signed"),
        ({"rate": -0.1}, r"rate'\] = -0\.1.*at least 0"),
        ({"seed": -1}, r"seed'\] = -1.*at least 0"),
        ({"nonzeros": 0}, r"nonzeros'\] = 0.*at least 1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        router_options("flylora", options)
