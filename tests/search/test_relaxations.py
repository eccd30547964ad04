"""Both relaxations of "the first n of N": values, gradients, and what the gradients are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guilomo.search import relaxation as relax

SHAPES = [(1,), (2,), (5,), (3, 4), (2, 3, 8)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_survival_is_a_survival_function(shape: tuple[int, ...], temperature: float) -> None:
    g = 3 * torch.randn(shape, dtype=torch.float64)
    mask = relax.survival(g, temperature)
    assert mask.shape == g.shape
    assert torch.equal(mask[..., 0], torch.ones(shape[:-1], dtype=g.dtype))
    assert (mask.diff(dim=-1) <= 0).all()
    assert (mask >= 0).all()
    counts = torch.arange(1, shape[-1] + 1, dtype=g.dtype)
    expected = ((g / temperature).softmax(-1) * counts).sum(-1)
    assert torch.allclose(relax.expected_count(mask), expected, rtol=1e-12)


def test_survival_is_the_chance_of_at_least_that_count() -> None:
    mask = relax.survival(torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log(), 1.0)
    assert torch.allclose(mask, torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_survival_gradcheck(shape: tuple[int, ...]) -> None:
    g = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: relax.survival(t, 0.7), g)
    assert torch.autograd.gradcheck(lambda t: relax.log_survival(relax.survival(t, 0.7)), g)


@pytest.mark.parametrize("start", ["low", "middle", "high"])
@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_a_gradient_step_grows_and_shrinks(reward: float, start: str) -> None:
    """Wherever it stands, rewarded later components raise the expected count and punished ones lower it."""
    g = {"low": -1.0, "middle": 0.0, "high": 1.0}[start] * torch.arange(6, dtype=torch.float64)
    g.requires_grad_()
    mask = relax.survival(g, 1.0)
    loss = -reward * mask[1:].sum()
    (gradient,) = torch.autograd.grad(loss, g)
    assert (gradient != 0).all()
    after = relax.expected_count(relax.survival(g - 0.1 * gradient, 1.0))
    assert reward * float((after - relax.expected_count(mask)).detach()) > 0


@pytest.mark.parametrize("component", [1, 3, 5])
def test_one_component_moves_every_entry_the_right_way(component: int) -> None:
    """Counts that contain a useful component gain, those that lack it lose."""
    g = torch.randn(6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(-relax.survival(g, 1.0)[component], g)
    assert (gradient[component:] < 0).all()
    assert (gradient[:component] > 0).all()


def test_log_survival_is_finite_and_starts_at_zero() -> None:
    g = torch.tensor([200.0, 0.0, -200.0], requires_grad=True)
    log = relax.log_survival(relax.survival(g, 1.0))
    assert log[0] == 0
    assert torch.isfinite(log).all()
    assert torch.allclose(log[1:], torch.tensor(relax.SURVIVAL_FLOOR).log())
    (gradient,) = torch.autograd.grad(log.sum(), g)
    assert torch.isfinite(gradient).all()


def test_harden() -> None:
    many = torch.rand(1000)
    assert torch.equal(relax.harden(many), (many >= 0.5).float())
    soft = torch.tensor([1.0, 0.7, 0.5, 0.4999, 0.0], requires_grad=True)
    hard = relax.harden(soft)
    assert torch.equal(hard, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    weights = torch.randn(5)
    assert torch.equal(torch.autograd.grad((hard * weights).sum(), soft)[0], weights)


def test_prefix_forward() -> None:
    g = torch.tensor([[0.1, 0.9, 0.2], [0.9, 0.1, 0.2], [0.0, 0.1, 0.2], [0.5, 0.5, 0.5]])
    leak = relax.RANK_LEAK
    wanted = torch.tensor([[1, 1, leak], [1, leak, leak], [1, 1, 1], [1, leak, leak]])
    assert leak == 1e-4
    assert torch.equal(relax.prefix_rank_mask(g), wanted)
    assert torch.equal(relax.prefix_count(g), torch.tensor([2.0, 1.0, 3.0, 1.0]))  # ties go to the lowest count


def test_prefix_experts_keep_at_least_so_many() -> None:
    g = torch.tensor([[0.9, 0.1, 0.2, 0.0], [0.0, 0.1, 0.9, 0.2]])
    assert torch.equal(relax.prefix_log_expert(g, 2), torch.tensor([[0.5, 0.5, -1e4, -1e4], [0.5, 0.5, 0.5, -1e4]]))
    assert torch.equal(relax.prefix_count(g, 2), torch.tensor([2.0, 3.0]))


def _by_hand(g: list[float], upstream: list[float], leak: float, least: int) -> Tensor:
    """The straight-through rule of the released code, entry by entry."""
    h = [float(torch.tensor(v, dtype=torch.float64).sigmoid()) for v in g]
    chosen = max(g.index(max(g)), least - 1)
    out = []
    for j in range(len(g)):
        at_h = sum(upstream[i] * h[i] for i in range(chosen + 1)) if j == chosen else leak * upstream[j]
        out.append(at_h * h[j] * (1 - h[j]))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("row", range(3))
def test_prefix_straight_through_rule(row: int) -> None:
    g = torch.randn(3, 5, dtype=torch.float64)
    upstream = torch.randn(3, 5, dtype=torch.float64)
    for apply, leak, least in (
        (relax.prefix_rank_mask, relax.RANK_LEAK, 1),
        (lambda t: relax.prefix_log_expert(t, 3), 0.0, 3),
    ):
        leaf = g.clone().requires_grad_()
        (found,) = torch.autograd.grad((apply(leaf) * upstream).sum(), leaf)
        wanted = _by_hand(g[row].tolist(), upstream[row].tolist(), leak, least)
        assert torch.allclose(found[row], wanted, rtol=1e-12, atol=1e-18)
        assert (found[row] != 0).any()


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_expert_signal_of_prefix_is_structurally_nil(top_k: int) -> None:
    """A common shift of all kept logits changes neither softmax nor top-k."""
    g = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.0], dtype=torch.float64)
    logits = torch.randn(40, 5, dtype=torch.float64)
    values = torch.randn(40, 5, dtype=torch.float64)
    offset = relax.prefix_log_expert(g, 2).requires_grad_()
    shifted = logits + offset
    kept = shifted.topk(top_k).indices
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, kept, True)
    weights = shifted.masked_fill(~chosen, float("-inf")).softmax(-1)
    (gradient,) = torch.autograd.grad((weights * values).sum(), offset)
    assert gradient[:3].abs().max() > 0.1
    assert gradient[:3].sum().abs() <= 1e-12
    assert torch.equal(gradient[3:], torch.zeros(2, dtype=torch.float64))
    # What reaches the vector is only the spread of sigmoid(g) over the kept entries, and nothing argues for more.
    leaf = g.clone().requires_grad_()
    relax.prefix_log_expert(leaf, 2).backward(gradient)
    h = g.sigmoid()
    assert torch.allclose(leaf.grad[2], ((h[:3] - h[0]) * gradient[:3]).sum() * h[2] * (1 - h[2]), rtol=1e-9)
    assert torch.equal(leaf.grad[[0, 1, 3, 4]], torch.zeros(4, dtype=torch.float64))
