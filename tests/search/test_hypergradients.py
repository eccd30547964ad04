"""The hypergradients against closed forms, finite differences of real optimiser steps, and each other, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from search_tools import (
    Residual,
    Tokens,
    assert_same_bits,
    batches,
    bilevel,
    mixture,
    regression,
    relative_error,
    small_config,
    state_of,
)
from torch import Tensor, nn

from guilomo.search import HYPERGRADIENTS
from guilomo.search import relaxation as relax
from guilomo.search.hypergradient import Problem, authors_code, exact, first_order, unrolled
from tiny_models import build, inputs_for


def _residual_problem(
    warm_steps: int = 3, outer_loss: str = "log", mixture_options: Any = None, **options: Any
) -> Problem:
    """Two adapted layers with 3 experts of rank 3, a router loss, dropout, and a step long enough to matter."""
    config = small_config(**{"learning_rate": 0.05, "max_grad_norm": None, "masks": "soft", **options})
    data = regression(width=6, rows=16, dtype=torch.float64)
    torch.manual_seed(6)  # an example in which the second order can be seen
    given = {"lora_dropout": 0.2, "balance_coefficient": 0.1, **(mixture_options or {})}
    model = mixture(Residual(depth=2, width=6), config, **given)
    return bilevel(model, data, config, outer_loss=outer_loss, warm_steps=warm_steps)


@contextmanager
def _after_a_real_step(problem: Problem, train: dict[str, Tensor]) -> Iterator[None]:
    """Within, the weights have taken one step of torch's own optimiser; afterwards nothing has happened.

    The random numbers go on from the training pass to what runs within, as in the hypergradients.
    """
    weights = [w.detach().clone() for w in problem.weights]
    state, rng = copy.deepcopy(problem.optimizer.state_dict()), torch.get_rng_state()
    gradients = torch.autograd.grad(problem.train_loss(train), problem.weights)
    for w, g in zip(problem.weights, gradients, strict=True):
        w.grad = g
    if problem.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(problem.weights, problem.max_grad_norm)
    problem.optimizer.step()
    yield
    problem.optimizer.zero_grad()
    problem.optimizer.load_state_dict(state)
    with torch.no_grad():
        for w, start in zip(problem.weights, weights, strict=True):
            w.copy_(start)
    torch.set_rng_state(rng)


def _direct(problem: Problem, train: dict[str, Tensor], held_out: dict[str, Tensor]) -> list[Tensor]:
    """``d_g L_held_out`` at the stepped weights taken as constants: the hypergradient without its second order."""
    with _after_a_real_step(problem, train):
        loss = problem.held_out_loss(held_out)
        return list(torch.autograd.grad(loss, problem.selection, allow_unused=True, materialize_grads=True))


def _finite_differences(
    problem: Problem, train: dict[str, Tensor], held_out: dict[str, Tensor], h: float = 1e-5
) -> list[Tensor]:
    """Of the whole map from the vectors through a real optimiser step to the held-out loss."""
    found = [torch.zeros_like(g) for g in problem.selection]
    for g, out in zip(problem.selection, found, strict=True):
        flat = g.detach().view(-1)
        for i in range(flat.numel()):
            values = []
            for sign in (1, -1):
                flat[i] += sign * h
                with _after_a_real_step(problem, train), torch.no_grad():
                    values.append(float(problem.held_out_loss(held_out)))
                flat[i] -= sign * h
            out.view(-1)[i] = (values[0] - values[1]) / (2 * h)
    return found


class _OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 4, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


class _SquaredError:
    """Summed squares per row, so that the loss is quadratic in B."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.train, self.held_out = (list(zip(x[s], y[s], strict=True)) for s in (slice(0, 9), slice(9, None)))

    def collate(self, rows: Any) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (logits - labels).square().sum(-1), torch.ones(len(logits), dtype=logits.dtype)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("outer_loss", ["log", "mean"])
def test_quadratic_problem_has_the_closed_form(outer_loss: str, optimizer: str) -> None:
    """``y = W x + s B m A x`` with B trained by one step; derived by hand, matrix by matrix.

    AdamW's first step is ``lr G / (|G| + eps)``, of slope ``lr eps / (|G| + eps)^2``; eps is large, so that it matters.
    """
    lr, eps, decay = 0.03, 0.5, 0.1
    config = small_config(max_experts=1, top_k=1, max_rank=3, masks="soft", max_grad_norm=None)
    x, y = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)
    model = mixture(_OneLinear().double(), config, lora_alpha=6.0)
    layer = model.get_base_model().layers[0]
    layer.molora_A["default"].requires_grad_(False)
    problem = bilevel(model, _SquaredError(x, y), config, outer_loss=outer_loss, warm_steps=0)
    trained = [layer.molora_B["default"]]
    problem.optimizer = (
        torch.optim.SGD(trained, lr=lr, weight_decay=decay)
        if optimizer == "sgd"
        else torch.optim.AdamW(trained, lr=lr, eps=eps, weight_decay=decay)
    )

    a, b = layer.molora_A["default"].detach(), layer.molora_B["default"].detach()
    w0 = layer.base_layer.weight.detach()
    pi = problem.vectors.ranks.detach()[0, 0].softmax(0)
    m = torch.stack([pi[j:].sum() for j in range(3)])
    d = torch.diag(m)
    scale = 6.0 / 3
    p, q = scale * a @ x[:9].T, scale * a @ x[9:].T
    y_t, y_v = y[:9].T - w0 @ x[:9].T, y[9:].T - w0 @ x[9:].T
    e = y_t - b @ d @ p
    gradient = -2 / 9 * e @ p.T @ d
    step, slope = lr * gradient, torch.full_like(gradient, lr)
    if optimizer == "adamw":
        step, slope = step / (gradient.abs() + eps), slope * eps / (gradient.abs() + eps).square()
    stepped = b * (1 - lr * decay) - step
    f = y_v - stepped @ d @ q
    at_m = -2 / 11 * (stepped.T @ f @ q.T).diagonal()
    g = -2 / 11 * f @ q.T @ d
    at_step = slope * g
    through = 2 / 9 * (-((b.T @ at_step) * (p @ p.T @ d)).sum(1) + (at_step.T @ e @ p.T).diagonal())
    jacobian = pi[None, :] * ((torch.arange(3)[None, :] >= torch.arange(3)[:, None]).double() - m[:, None])
    value = f.square().sum() / 11
    wanted = (at_m + through) @ jacobian / (value if outer_loss == "log" else 1)

    train, held_out = batches(problem)
    assert (through @ jacobian).norm() > 0.02 * (at_m @ jacobian).norm()  # the second order can be seen
    for function in (exact, unrolled):
        found = function(problem, train, held_out)[1].flatten()
        assert relative_error([found], [wanted]) < (1e-8 if function is exact else 1e-4), function
    f0 = y_v - b @ d @ q
    value0 = f0.square().sum() / 11
    plain = -2 / 11 * (b.T @ f0 @ q.T).diagonal() @ jacobian / (value0 if outer_loss == "log" else 1)
    assert torch.allclose(first_order(problem, train, held_out)[1].flatten(), plain, rtol=1e-10)


@pytest.mark.parametrize("masks", [{"masks": "soft"}, {}, {"min_experts": 0}], ids=lambda m: str(m or "sampled"))
@pytest.mark.parametrize("outer_loss", ["log", "mean"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize(("optimizer", "warm_steps"), [("sgd", 0), ("adamw", 1), ("adamw", 4)])
def test_unrolled_agrees_with_exact(
    optimizer: str, warm_steps: int, max_grad_norm: float | None, outer_loss: str, masks: dict[str, Any]
) -> None:
    """For expert counts and for ranks, each by itself."""
    rate = {"sgd": 0.2, "adamw": 0.02}[optimizer]
    options = {"optimizer": optimizer, "learning_rate": rate, "max_grad_norm": max_grad_norm, "weight_decay": 0.1}
    problem = _residual_problem(warm_steps, outer_loss, **{"masks": "sampled", **options, **masks})
    train, held_out = batches(problem)
    found, wanted = unrolled(problem, train, held_out), exact(problem, train, held_out)
    direct = _direct(problem, train, held_out)
    assert relative_error(direct, wanted) > 2e-3  # the second order is well above the tolerance
    assert all(relative_error([a], [b]) < 1e-4 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("max_experts", [1, 3])
@pytest.mark.parametrize(("optimizer", "warm_steps"), [("sgd", 0), ("adamw", 1), ("adamw", 4)])
def test_exact_agrees_with_finite_differences(optimizer: str, warm_steps: int, max_experts: int) -> None:
    """No clipping here: its own derivative is neglected by design."""
    rate = {"sgd": 1.0, "adamw": 0.02}[optimizer]
    options = {"optimizer": optimizer, "learning_rate": rate, "weight_decay": 0.1, "max_rank": 2}
    problem = _residual_problem(warm_steps, max_experts=max_experts, top_k=min(2, max_experts), **options)
    train, held_out = batches(problem)
    found = exact(problem, train, held_out)
    wanted = _finite_differences(problem, train, held_out)
    assert relative_error(found, wanted) < 1e-6
    assert relative_error(_direct(problem, train, held_out), wanted) > 1e-3


@pytest.mark.parametrize("masks", ["sampled", "soft", "hard"])
def test_first_order_is_the_gradient_at_the_present_weights(masks: str) -> None:
    problem = _residual_problem(masks=masks, mixture_options={"lora_dropout": 0.0})
    train, held_out = batches(problem)
    problem.model.eval()  # no router loss: the outer objective has none
    wanted = torch.autograd.grad(problem.held_out_loss(held_out), problem.selection)
    problem.model.train()
    found = first_order(problem, train, held_out)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert (found[1] != 0).any()
    assert (found[0] != 0).any() == (masks != "hard")  # behind hard masks no token chooses a removed expert


def test_unrolled_agrees_with_exact_on_a_fresh_optimizer() -> None:
    """Adam's first step is almost a sign, and its Jacobian is a small difference of large numbers."""
    problem = _residual_problem(0, optimizer="adamw", learning_rate=0.02)
    train, held_out = batches(problem)
    wanted = exact(problem, train, held_out)
    assert relative_error(_direct(problem, train, held_out), wanted) > 5e-4
    assert relative_error(unrolled(problem, train, held_out), wanted) < 1e-4
    assert relative_error(first_order(problem, train, held_out), wanted) > 1e-3


def test_the_router_loss_of_held_out_rows_has_no_part() -> None:
    loud, quiet = (
        _residual_problem(0, mixture_options={"balance_coefficient": c, "lora_dropout": 0.0}) for c in (10.0, 0.0)
    )
    quiet.vectors.load_state_dict(loud.vectors.state_dict())
    quiet.model.load_state_dict(loud.model.state_dict())
    quiet.data = loud.data
    train, held_out = batches(loud)
    for a, b in zip(first_order(loud, train, held_out), first_order(quiet, train, held_out), strict=True):
        assert torch.equal(a, b)
    # In the training loss it does have one.
    assert relative_error(exact(loud, train, held_out), exact(quiet, train, held_out)) > 1e-4


@pytest.mark.parametrize("masks", ["sampled", "soft"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_transformers(name: str, masks: str) -> None:
    """Attention, embeddings, padding and a trained head, through the same three functions."""
    config = small_config(max_experts=2, max_rank=2, min_experts=1, masks=masks, learning_rate=2e-3)
    model = build(name).double()
    targets = ["q_proj", "v_proj"] if name == "llama" else ["query", "intermediate.dense"]
    heads = ["classifier"] if name == "bert" else None
    model = mixture(model, config, target_modules=targets, modules_to_save=heads)
    problem = bilevel(model, Tokens(inputs_for(name, rows=6), train=3), config)
    train, held_out = batches(problem)
    wanted = exact(problem, train, held_out)
    second_order = relative_error(_direct(problem, train, held_out), wanted)
    assert second_order > 1e-3
    # Llama's norms compute in float32 even here, which a difference over a short way enlarges.
    assert relative_error(unrolled(problem, train, held_out), wanted) < (1e-4 if name == "bert" else second_order / 10)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_authors_code_is_its_formula(optimizer: str, max_grad_norm: float | None) -> None:
    """Dossier, section 2.7, item 3, from plain gradients and torch's own optimiser."""
    eta = 0.01
    problem = _residual_problem(optimizer=optimizer, learning_rate=eta, max_grad_norm=max_grad_norm)
    train, held_out = batches(problem)
    found = authors_code(problem, train, held_out)

    rng = torch.get_rng_state()
    n = len(problem.weights)
    at_w = torch.autograd.grad(problem.train_loss(train), problem.weights + problem.selection)
    torch.set_rng_state(rng)
    with _after_a_real_step(problem, train):
        after = torch.autograd.grad(problem.held_out_loss(held_out), problem.weights + problem.selection)
    v = [a + b for a, b in zip(at_w[:n], after[:n], strict=True)]
    norm = torch.cat([t.flatten() for t in v]).norm()
    start = [w.detach().clone() for w in problem.weights]
    with torch.no_grad():
        for w, d in zip(problem.weights, v, strict=True):
            w -= 0.01 / norm * d
    minus = torch.autograd.grad(problem.train_loss(train), problem.selection)
    with torch.no_grad():
        for w, s in zip(problem.weights, start, strict=True):
            w.copy_(s)
    wanted = [t + h + eta * norm / 0.02 * m for t, h, m in zip(at_w[n:], after[n:], minus, strict=True)]
    assert relative_error(found, wanted) < 1e-12
    torch.set_rng_state(rng)
    assert relative_error(found, exact(problem, train, held_out)) > 0.1  # and it is not the hypergradient


@pytest.mark.parametrize("masks", ["sampled", "soft"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", HYPERGRADIENTS)
def test_nothing_is_left_behind(name: str, optimizer: str, masks: str) -> None:
    problem = _residual_problem(optimizer=optimizer, max_grad_norm=0.5, masks=masks)
    for p in problem.weights + problem.selection:
        p.grad = torch.randn_like(p)
    problem.weights[0].grad = None

    def state() -> dict[str, Tensor]:
        tensors = {f"model {k}": v for k, v in problem.model.state_dict().items()}
        tensors |= {f"vectors {k}": v for k, v in problem.vectors.state_dict().items()}
        everything = enumerate(problem.weights + problem.selection)
        tensors |= {f"grad {i}": p.grad for i, p in everything if p.grad is not None}
        tensors |= {f"optimiser {k}": v for k, v in state_of(problem.optimizer).items()}
        return {k: v.clone() for k, v in tensors.items()} | {"rng": torch.get_rng_state()}

    before = state()
    train, held_out = batches(problem)
    found = HYPERGRADIENTS[name](problem, train, held_out)
    assert_same_bits(before, state())
    assert problem.context.masks == {}
    assert problem.context.attach_losses
    assert [g.shape for g in found] == [g.shape for g in problem.selection]
    assert not any(g.requires_grad for g in found)
    again = HYPERGRADIENTS[name](problem, train, held_out)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_failing_pass_does_not_silence_the_router_losses() -> None:
    problem = _residual_problem()
    train, held_out = batches(problem)
    held_out["x"] = held_out["x"][:, :2]
    for function in (first_order, exact):
        with pytest.raises(RuntimeError):
            function(problem, train, held_out)
        assert problem.context.attach_losses
        assert problem.context.masks == {}


def test_prefix_gives_its_own_signal_to_the_ranks() -> None:
    """Through a network: only chosen entries and, damped by 1e-4, those beyond get a gradient."""
    problem = _residual_problem(relaxation="prefix", mixture_options={"lora_dropout": 0.0})
    train, held_out = batches(problem)
    experts, ranks = first_order(problem, train, held_out)
    chosen = problem.vectors.ranks.argmax(-1, keepdim=True)
    at_chosen = ranks.gather(-1, chosen).abs().max()
    others = ranks.scatter(-1, chosen, 0.0).abs().max()
    assert 0 < others < 100 * relax.RANK_LEAK * at_chosen
    at_chosen = problem.vectors.experts.argmax(-1, keepdim=True).clamp_min(1)
    assert (experts.gather(-1, at_chosen) != 0).any()
    assert not experts.scatter(-1, at_chosen, 0.0).any()
