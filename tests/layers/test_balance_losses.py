"""Router losses against loops written from their definitions, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers import BALANCE_FORMS, RouterStatistics, Routing, balance_loss, router_statistics, z_loss
from guilomo.layers.routers import TopKRouter

E, K = 4, 2


def routed(tokens: int = 37, top_k: int = K) -> Routing:
    """Tokens that prefer the later experts, so that no form takes its value at uniform."""
    return TopKRouter(6, E, top_k).route(torch.randn(tokens, E, dtype=torch.float64) + torch.arange(E))


def even(tokens: int = 12) -> Routing:
    """Every expert is chosen equally often, with equal weights and probabilities."""
    chosen = torch.zeros(tokens, E, dtype=torch.bool)
    for t in range(tokens):
        chosen[t, [(t + k) % E for k in range(K)]] = True
    return Routing(
        given=chosen.double() / K,
        logits=torch.zeros(tokens, E, dtype=torch.float64),
        kept=chosen,
    )


def by_hand(form: str, routing: Routing) -> float:
    """The forms as their papers write them, in Python floats."""
    p, w, c = (t.tolist() for t in (routing.probabilities, routing.weights, routing.chosen))
    tokens = len(p)
    count = [sum(row[e] for row in c) for e in range(E)]
    mean_p = [sum(row[e] for row in p) / tokens for e in range(E)]
    mean_w = [sum(row[e] for row in w) / tokens for e in range(E)]
    if form == "switch":
        return E * sum(count[e] / sum(count) * mean_p[e] for e in range(E))
    if form == "switch_per_slot":
        return E * sum(count[e] / tokens * mean_p[e] for e in range(E))
    if form == "sign":
        return E * sum(count[e] / sum(count) * mean_w[e] for e in range(E))
    z = [sum(row[e] for row in w) for e in range(E)]
    mean = sum(z) / E
    return sum((v - mean) ** 2 for v in z) / E / (mean**2 + 1e-10)


@pytest.mark.parametrize(
    ("form", "value"), [("switch", 1.0), ("switch_per_slot", K), ("sign", 1.0), ("cv_squared", 0.0)]
)
def test_value_at_uniform(form: str, value: float) -> None:
    found = balance_loss(form, router_statistics(even(), None))
    assert found.item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("form", BALANCE_FORMS)
def test_equals_the_definition(form: str) -> None:
    routing = routed()
    found = balance_loss(form, router_statistics(routing, None)).item()
    assert found == pytest.approx(by_hand(form, routing), rel=1e-12)
    assert found != pytest.approx(by_hand(form, even()), rel=1e-3), "the example is not uniform, so the value matters"


def test_switch_per_slot_is_the_loss_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(37, E)
    ours = balance_loss("switch_per_slot", router_statistics(TopKRouter(6, E, K).route(logits), None))
    theirs = load_balancing_loss_func((logits,), E, K)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_sign_form_is_not_bounded_below_by_one() -> None:
    """Three experts, tokens (.9, .1, 0) and (0, .1, .9): E * sum f W = 0.825."""
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]], dtype=torch.float64)
    routing = Routing(weights, weights, weights > 0)
    assert balance_loss("sign", router_statistics(routing, None)).item() == pytest.approx(0.825, abs=1e-12)


@pytest.mark.parametrize("form", BALANCE_FORMS)
def test_gradient(form: str) -> None:
    """Through probabilities and weights, never through counts."""
    router = TopKRouter(6, E, K).double()
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: balance_loss(form, router_statistics(router.route(u), None)), logits)


def test_adding_statistics_is_concatenating_tokens() -> None:
    a, b = routed(5), routed(8)
    both = Routing(*(torch.cat([getattr(a, n), getattr(b, n)]) for n in Routing.__dataclass_fields__))
    added = router_statistics(a, None) + router_statistics(b, None)
    whole = router_statistics(both, None)
    for name in RouterStatistics.__dataclass_fields__:
        assert torch.allclose(getattr(added, name), getattr(whole, name), rtol=1e-14), name
    assert torch.equal(added.counts, whole.counts)
    for form in BALANCE_FORMS:
        assert torch.allclose(balance_loss(form, added), balance_loss(form, whole), rtol=1e-13)


def _losses(logits: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    statistics = router_statistics(TopKRouter(6, E, K).route(logits), real)
    total = torch.stack([balance_loss(form, statistics) for form in BALANCE_FORMS] + [z_loss(statistics)]).sum()
    return total.detach(), torch.autograd.grad(total, logits)[0]


def test_padding_is_never_counted() -> None:
    logits = torch.randn(3, 7, E, dtype=torch.float64)
    real = torch.ones(3, 7)
    real[0, 4:] = 0
    real[2, :3] = 0
    other = torch.where(real[..., None].bool(), logits, 100 * torch.randn_like(logits))
    (loss, gradient), (same, same_gradient) = _losses(logits, real), _losses(other, real)
    assert torch.equal(loss, same)
    assert torch.equal(gradient, same_gradient)
    assert torch.equal(gradient[real == 0], torch.zeros(6, E, dtype=torch.float64))
    kept = logits[real.bool()]
    assert torch.allclose(loss, _losses(kept, torch.ones(len(kept)))[0], rtol=1e-13)
    assert not torch.allclose(loss, _losses(other, torch.ones(3, 7))[0], rtol=1e-3), "the padding would have mattered"


@pytest.mark.parametrize("form", BALANCE_FORMS)
def test_no_tokens_no_loss(form: str) -> None:
    statistics = router_statistics(routed(4), torch.zeros(4))
    assert balance_loss(form, statistics).item() == 0
    assert z_loss(statistics).item() == 0


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    routing = routed(9)
    wanted = sum(math.log(sum(math.exp(u) for u in row)) ** 2 for row in routing.logits.tolist()) / 9
    assert z_loss(router_statistics(routing, None)).item() == pytest.approx(wanted, rel=1e-12)


def test_unknown_form_proposes_the_nearest() -> None:
    with pytest.raises(GuilomoError, match=r"balance_loss = 'swich'.*Did you mean 'switch'"):
        balance_loss("swich", router_statistics(even(), None))
