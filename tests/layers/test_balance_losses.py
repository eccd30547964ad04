"""Router losses against loops written from their definitions, and what must not change them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers import BALANCE_FORMS, RouterStatistics, Routing, balance_loss, router_statistics, z_loss
from guilomo.layers.balance import EVERYTHING, own_loss, read_by
from guilomo.layers.routers import TopKRouter
from guilomo.layers.routing import Tokens

E, K = 4, 2
NONE = Tokens(torch.empty(0))
FORMS = [form for form in BALANCE_FORMS if form != "localized"]
"""Those that need no tasks."""
SUMS = EVERYTHING | {"first", "penalty"}


def routed(tokens: int = 37, top_k: int = K) -> Routing:
    """Tokens that prefer the later experts, so that no form takes its value at uniform."""
    routing = TopKRouter(6, E, top_k).route(torch.randn(tokens, E, dtype=torch.float64) + torch.arange(E), NONE)
    return replace(routing, penalty=torch.rand(tokens, dtype=torch.float64))


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


def _entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


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
    if form == "divergence":
        high, low = 0.98 * math.log(E), 0.5 * math.log(E)
        spread, doubt = min(_entropy(mean_w), high), max(sum(map(_entropy, w)) / tokens, low)
        return max(0.0, (high - low) - (spread - doubt)) / math.log(E)
    if form == "rsl":
        first = [sum(max(row) == row[e] for row in routing.logits.tolist()) / tokens for e in range(E)]
        return sum(a * b for a, b in zip(mean_w, first, strict=True)) + sum(map(_entropy, w)) / tokens
    z = [sum(row[e] for row in w) for e in range(E)]
    mean = sum(z) / E
    return sum((v - mean) ** 2 for v in z) / E / (mean**2 + 1e-10)


@pytest.mark.parametrize(
    ("form", "value"), [("switch", 1.0), ("switch_per_slot", K), ("sign", 1.0), ("cv_squared", 0.0)]
)
def test_value_at_uniform(form: str, value: float) -> None:
    found = balance_loss(form, router_statistics(even(), None))
    assert found.item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(form: str) -> None:
    routing = routed()
    found = balance_loss(form, router_statistics(routing, None, read_by(form, False))).item()
    assert found == pytest.approx(by_hand(form, routing), rel=1e-12)
    assert found != pytest.approx(by_hand(form, even()), rel=1e-3), "the example is not uniform, so the value matters"


def test_switch_per_slot_is_the_loss_of_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(37, E)
    ours = balance_loss("switch_per_slot", router_statistics(TopKRouter(6, E, K).route(logits, NONE), None))
    theirs = load_balancing_loss_func((logits,), E, K)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_sign_form_is_not_bounded_below_by_one() -> None:
    """Three experts, tokens (.9, .1, 0) and (0, .1, .9): E * sum f W = 0.825."""
    weights = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]], dtype=torch.float64)
    routing = Routing(weights, weights, weights > 0)
    assert balance_loss("sign", router_statistics(routing, None)).item() == pytest.approx(0.825, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradient(form: str) -> None:
    """Through probabilities and weights, never through counts."""
    router = TopKRouter(6, E, K).double()
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda u: balance_loss(form, router_statistics(router.route(u, NONE), None, read_by(form, False))), logits
    )


def test_adding_statistics_is_concatenating_tokens() -> None:
    a, b = routed(5), routed(8)
    both = Routing(*(torch.cat([getattr(a, n), getattr(b, n)]) for n in Routing.__dataclass_fields__))
    added = router_statistics(a, None, SUMS) + router_statistics(b, None, SUMS)
    whole = router_statistics(both, None, SUMS)
    for name in RouterStatistics.__dataclass_fields__:
        assert torch.allclose(getattr(added, name), getattr(whole, name), rtol=1e-14), name
    assert torch.equal(added.counts, whole.counts)
    for form in FORMS:
        assert torch.allclose(balance_loss(form, added), balance_loss(form, whole), rtol=1e-13)


def _losses(logits: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    statistics = router_statistics(TopKRouter(6, E, K).route(logits, NONE), real, SUMS - {"penalty"})
    total = torch.stack([balance_loss(form, statistics) for form in FORMS] + [z_loss(statistics)]).sum()
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


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_no_loss(form: str) -> None:
    statistics = router_statistics(routed(4), torch.zeros(4), SUMS)
    assert balance_loss(form, statistics).item() == 0
    assert z_loss(statistics).item() == 0


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    routing = routed(9)
    wanted = sum(math.log(sum(math.exp(u) for u in row)) ** 2 for row in routing.logits.tolist()) / 9
    assert z_loss(router_statistics(routing, None)).item() == pytest.approx(wanted, rel=1e-12)


def test_localized_is_the_definition() -> None:
    """Two types: the first half of the experts belongs to type 1, the second half to type 0."""
    weights = torch.rand(3, 5, E, dtype=torch.float64)
    routing, tasks = Routing(weights, weights), torch.tensor([0, 1, 1])
    real = torch.ones(3, 5)
    real[1, 3:] = 0
    found = balance_loss("localized", router_statistics(routing, real, frozenset({"rows"}), tasks), delta=0.25)
    z = []
    for b in range(3):
        for e in range(E):
            own = (e < E // 2) == (int(tasks[b]) == 1)
            q = sum(float(weights[b, t, e]) for t in range(5) if real[b, t])
            z.append((1.25 if own else 0.75) * q)
    mean = sum(z) / len(z)
    assert found.item() == pytest.approx(sum((v - mean) ** 2 for v in z) / len(z) / (mean**2 + 1e-10), rel=1e-12)


def test_localized_is_zero_where_all_are_equal() -> None:
    """Of Z, not of the weights: a row must give its own group (1 - delta) / (1 + delta) of what it gives the others."""
    weights = torch.tensor([[0.75, 0.75, 1.25, 1.25], [1.25, 1.25, 0.75, 0.75]], dtype=torch.float64)
    statistics = router_statistics(Routing(weights, weights), None, frozenset({"rows"}), torch.tensor([1, 0]))
    assert balance_loss("localized", statistics, delta=0.25).item() == pytest.approx(0, abs=1e-12)
    assert balance_loss("localized", statistics, delta=0.0).item() > 0.01
    more = torch.cat([weights, torch.rand(1, 4, dtype=torch.float64)])
    held_out = torch.tensor([1, 1, 0])
    statistics = router_statistics(Routing(more, more), held_out, frozenset({"rows"}), torch.tensor([1, 0, 1]))
    assert balance_loss("localized", statistics, delta=0.25).item() == pytest.approx(0, abs=1e-12)
    none = router_statistics(Routing(weights, weights), torch.zeros(2), frozenset({"rows"}), torch.tensor([1, 0]))
    assert balance_loss("localized", none).item() == 0


def test_localized_needs_tasks() -> None:
    with pytest.raises(GuilomoError, match=r"router_task_ids"):
        router_statistics(routed(4), None, frozenset({"rows"}))


def test_entropy_has_the_analytic_gradient() -> None:
    """d(-H)/dp = log p + 1, and it is finite where a weight is 0."""
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64, requires_grad=True)
    statistics = router_statistics(Routing(p, p), None, frozenset({"entropy"}))
    (found,) = torch.autograd.grad(-statistics.entropy, p)
    assert torch.allclose(found[0, :3], p.detach()[0, :3].log() + 1, rtol=1e-12)
    assert found.isfinite().all()


@pytest.mark.parametrize(("sign", "end"), [(1, 0.0), (-1, math.log(3))])
def test_the_sign_of_the_entropy_decides(sign: int, end: float) -> None:
    """Printed (-1), minimising the loss makes tokens undecided; as described (+1), decided."""
    u = torch.tensor([[2.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([u], lr=1.0)
    for _ in range(4000):
        optimizer.zero_grad()
        statistics = router_statistics(Routing(u.softmax(-1), u), None, read_by("rsl", False))
        balance_loss("rsl", statistics, entropy_sign=sign, load_weight=0.0).backward()
        optimizer.step()
    assert statistics.entropy.item() == pytest.approx(end, abs=0.01)


def test_penalty_is_the_mean_over_real_tokens() -> None:
    routing = routed(4)
    routing.penalty = torch.tensor([1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
    statistics = router_statistics(routing, torch.tensor([1, 1, 1, 0]), frozenset({"penalty"}))
    assert own_loss(statistics).item() == 2.0
    with pytest.raises(GuilomoError, match=r"router_task_ids"):
        router_statistics(replace(routed(4), penalty=None), None, frozenset({"penalty"}))


def test_unknown_form_proposes_the_nearest() -> None:
    with pytest.raises(GuilomoError, match=r"balance_loss = 'swich'.*Did you mean 'switch'"):
        balance_loss("swich", router_statistics(even(), None))
