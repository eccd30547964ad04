"""SMoRA: gates that sum to K, a bias that selects, and counts that it follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers.naive import naive_delta
from guilomo.layers.routers import LossFreeRouter, router_options
from guilomo.layers.routing import Tokens

I, E, K = 9, 6, 3  # noqa: E741


def _router(top_k: int = K, **options: object) -> LossFreeRouter:
    router = LossFreeRouter(I, E, top_k, **options).double()
    router.bias = 0.2 * torch.randn(E, dtype=torch.float64)
    return router


@pytest.mark.parametrize("bias_in_gate", [False, True])
@pytest.mark.parametrize("top_k", [1, K, E])
def test_is_the_published_formula(top_k: int, bias_in_gate: bool) -> None:
    router, rows = _router(top_k, bias_in_gate=bias_in_gate), []
    x = torch.randn(40, I, dtype=torch.float64, requires_grad=True)
    for token in x:
        s = torch.sigmoid(router.weight @ token)
        selecting = s + router.bias
        order = selecting.tolist()
        kept = sorted(range(E), key=lambda e, order=order: (-order[e], e))[:top_k]
        value = selecting if bias_in_gate else s
        total = sum(value[e] for e in kept)
        rows.append(torch.stack([top_k * value[e] / total if e in kept else torch.zeros_like(s[e]) for e in range(E)]))
    wanted, found = torch.stack(rows), router(x)
    assert torch.allclose(found.weights, wanted, rtol=1e-12)
    assert torch.allclose(found.weights.sum(-1), torch.full((40,), float(top_k), dtype=torch.float64), rtol=1e-12)
    assert torch.equal(found.chosen, wanted != 0)
    reads = torch.randn(40, E, dtype=torch.float64)
    ours, naive = (torch.autograd.grad((w * reads).sum(), (x, router.weight)) for w in (found.weights, wanted))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(ours, naive, strict=True))


def test_the_bias_selects_and_does_not_weigh() -> None:
    router = _router()
    x = torch.randn(50, I, dtype=torch.float64)
    with torch.no_grad():
        unbiased = LossFreeRouter(I, E, K).double()
        unbiased.weight.copy_(router.weight)
    a, b = router(x), unbiased(x)
    same = (a.chosen == b.chosen).all(-1)
    assert 0 < int(same.sum()) < 50
    assert torch.equal(a.weights[same], b.weights[same])
    leaking = _router(bias_in_gate=True)
    leaking.load_state_dict(router.state_dict())
    assert not torch.allclose(leaking(x).weights, a.weights, rtol=1e-3)


def test_uniform_scores_and_all_ranks_are_plain_lora() -> None:
    """With scale alpha / K: every weight is 1."""
    router = LossFreeRouter(I, E, E).double()
    with torch.no_grad():
        router.weight.zero_()
    x = torch.randn(11, I, dtype=torch.float64)
    a, b = torch.randn(E, I, dtype=torch.float64), torch.randn(4, E, dtype=torch.float64)
    delta = naive_delta(x, a, b, router(x).weights, [1] * E, [16 / E] * E)
    assert torch.allclose(delta, 16 / E * x @ a.T @ b.T, rtol=1e-12)


def test_one_block_is_a_top_1_mixture_of_gate_1() -> None:
    router = _router(1)
    x = torch.randn(20, I, dtype=torch.float64)
    winner = (torch.sigmoid(x @ router.weight.T) + router.bias).argmax(-1)
    weights = router(x).weights
    assert torch.allclose(weights, torch.nn.functional.one_hot(winner, E).double(), rtol=1e-12)
    # Blocks of g ranks that share one score, with scale alpha / K for K = g active ranks.
    g, alpha = 3, 16.0
    a, b = torch.randn(E * g, I, dtype=torch.float64), torch.randn(4, E * g, dtype=torch.float64)
    wanted = torch.stack(
        [
            alpha / g * b[:, e * g : e * g + g] @ (a[e * g : e * g + g] @ token)
            for token, e in zip(x, winner, strict=True)
        ]
    )
    assert torch.allclose(naive_delta(x, a, b, weights, [g] * E, [alpha / g] * E), wanted, rtol=1e-11, atol=1e-12)


def _step(router: LossFreeRouter, x: Tensor) -> Tensor:
    tokens = Tokens(x)
    router.observe(router.route(router.logits(x), tokens), tokens)
    counts = router.take_counts()
    router.move_bias(counts)
    return counts


def test_the_bias_evens_out_a_skewed_load() -> None:
    router = LossFreeRouter(I, E, K, rate=0.01).double()
    x = torch.randn(400, I, dtype=torch.float64) + torch.randn(I, dtype=torch.float64)
    first = _step(router, x)
    for _ in range(200):
        last = _step(router, x)
    assert first.sum() == last.sum() == 400 * K
    assert float(first.double().std()) > 60
    assert float(last.double().std()) < 0.2 * float(first.double().std())


def test_one_step_is_the_sign_of_what_is_missing() -> None:
    router = LossFreeRouter(I, E, K, rate=0.5)
    router.move_bias(torch.tensor([0, 2, 2, 2, 3, 3]))  # mean 2
    assert router.bias.tolist() == [0.5, 0.0, 0.0, 0.0, -0.5, -0.5]
    router.move_bias(torch.zeros(E, dtype=torch.int64))
    assert router.bias.tolist() == [0.5, 0.0, 0.0, 0.0, -0.5, -0.5], "no tokens, no step"


def test_padding_is_not_counted() -> None:
    router = _router()
    x, real = torch.randn(2, 5, I, dtype=torch.float64), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    tokens = Tokens(x, real)
    router.observe(router.route(router.logits(x), tokens), tokens)
    assert torch.equal(router.take_counts(), router(x[real.bool()]).chosen.sum(0))
    assert not router.take_counts().any()


def test_the_bias_is_saved_and_never_trained_nor_rounded() -> None:
    router = LossFreeRouter(I, E, K)
    router.bias += 1.00001
    assert "bias" in router.state_dict()
    assert {n for n, _ in router.named_parameters()} == {"weight"}
    assert torch.equal(router.bfloat16().bias, torch.full((E,), 1.00001))
    assert router.double().bias.dtype == torch.float64


def test_parameters() -> None:
    """(r / g) d_in: a row for every block; the bias is a buffer."""
    assert LossFreeRouter.parameters_for(E, I) == E * I == sum(p.numel() for p in _router().parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -1e-5}, r"rate'\] = -1e-05.*at least 0"),
        ({"bias_in_gate": "yes"}, r"bias_in_gate'\] = 'yes'.*False, True"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        router_options("loss_free", options)
