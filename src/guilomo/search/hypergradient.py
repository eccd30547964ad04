"""Gradients of the held-out loss with respect to the selection vectors.

Every function returns one tensor per selection tensor and leaves weights, gradients, optimiser state and random
numbers bit-identical to what it found. `first_order` without the split lives here too, as the twin the split batch is
tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from guilomo.errors import GuilomoError
from guilomo.search.data import Batch, SearchData, mean_loss, row_losses, twice
from guilomo.search.distributed import totals
from guilomo.search.draws import HOLDING_OUT, TRAINING, Rows, Shown, show
from guilomo.search.inner import Snapshot, clip_factor, virtual_update
from guilomo.search.split_pass import collected_router_losses, masked, without_router_losses
from guilomo.search.vectors import SelectionVectors
from guilomo.tuner import RoutingContext


@dataclass
class Problem:
    """The bilevel problem at one step: model, vectors, inner optimiser and one batch of each kind."""

    model: nn.Module
    context: RoutingContext
    vectors: SelectionVectors
    optimizer: torch.optim.Optimizer
    data: SearchData
    max_grad_norm: float | None
    outer_loss: str = "log"
    step: int = 0

    @property
    def weights(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def selection(self) -> list[Tensor]:
        return list(self.vectors.parameters())

    def train_loss(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """The inner objective; `model` stands in for the problem's own."""
        with self._training(batch, model) as loss:
            return loss

    def held_out_loss(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """The outer objective: the mean held-out loss or its logarithm, without auxiliary losses."""
        with self._holding_out(batch, model) as loss:
            return loss

    def train_gradients(self, batch: Batch, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the inner objective."""
        with self._training(batch) as loss:
            return self.gradients(loss, wanted)

    def held_out_gradients(self, batch: Batch, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the outer objective."""
        with self._holding_out(batch) as loss:
            return self.gradients(loss, wanted)

    def gradients(self, loss: Tensor, wanted: Sequence[Tensor], **options: Any) -> list[Tensor]:
        """Gradients of the global batch, 0 where the loss does not reach; an error where the model hides them all."""
        found = torch.autograd.grad(loss, list(wanted), allow_unused=True, **options)
        # Draws of expert counts reach the loss around the model.
        if all(g is None for p, g in zip(wanted, found, strict=True) if p is not self.vectors.experts):
            raise GuilomoError(
                "The loss reaches neither weights nor selection vectors. Reentrant gradient checkpointing hides them: "
                "turn it on with use_reentrant=False, or not at all, or use hypergradient = 'first_order'."
            )
        return totals([torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)])

    @contextmanager
    def _training(self, batch: Batch, model: nn.Module | None = None) -> Iterator[Tensor]:
        with self.losses(batch, TRAINING, model) as (mean, score):
            yield mean + score

    @contextmanager
    def _holding_out(self, batch: Batch, model: nn.Module | None = None) -> Iterator[Tensor]:
        with without_router_losses(self.context), self.losses(batch, HOLDING_OUT, model) as (mean, score):
            yield outer(mean, score, self.outer_loss)

    @contextmanager
    def losses(
        self, batch: Batch, kinds: tuple[Rows, Rows], model: nn.Module | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean loss, and the zero that carries its gradient through drawn counts.

        The masks apply within, because checkpointed layers run again in the backward.
        """
        batch, shown = self.seen(batch, kinds)
        with masked(self.context, shown.masks):
            sums, counts = row_losses(model or self.model, batch, self.data)
            yield mean_loss(sums, counts), shown.score(sums, counts)

    def seen(self, batch: Batch, kinds: tuple[Rows, Rows]) -> tuple[Batch, Shown]:
        """The batch with its masks; all rows twice, under two draws, where expert counts are drawn."""
        rows, pairs = len(batch["labels"]), self.vectors.pairs
        shown = show(self.vectors, self.step, [(kind, rows) for kind in (kinds if pairs else kinds[:1])])
        return (twice(batch) if pairs else batch), shown


def outer(loss: Tensor, score: Tensor, kind: str) -> Tensor:
    """The held-out loss as the selection vectors see it, with the `score` of its draws (see `draws.Shown.score`)."""
    if kind == "mean":
        return loss + score
    floored = loss.clamp_min(1e-12)
    return floored.log() + score / floored.detach()


Hypergradient = Callable[[Problem, Batch, Batch], list[Tensor]]


def first_order(problem: Problem, train: Batch, held_out: Batch) -> list[Tensor]:
    """``d L_held_out(w, g) / d g`` at the present weights (DARTS' first-order form, arXiv 1806.09055)."""
    state = Snapshot.take(problem.weights)
    result = problem.held_out_gradients(held_out, problem.selection)
    state.restore(problem.weights)
    return result


@dataclass(frozen=True)
class UnrolledPass:
    """What `unrolled_pass` found: gradients of selection vectors and of weights, and both mean losses ``()``."""

    selection: list[Tensor]
    weights: list[Tensor]
    train: Tensor
    held_out: Tensor


def unrolled(problem: Problem, train: Batch, held_out: Batch) -> list[Tensor]:
    """One inner step unrolled, by a difference (GuiLoMo, arXiv 2506.14646; DARTS section 2.3), corrected."""
    return unrolled_pass(problem, train, held_out).selection


def unrolled_pass(problem: Problem, train: Batch, held_out: Batch) -> UnrolledPass:
    """The unrolled hypergradient in three passes, the first of which is the coming step's own.

        d_g L_val(w', g) - [d_g L_train(w + eps u, g) - d_g L_train(w, g)] / eps

    with ``w' = step(w, d_w L_train)`` the step of the optimiser in use, ``u = J v`` for that step's diagonal Jacobian J
    and ``v = d_{w'} L_val``. Gradients at w come from the pass that gives ``d_w L_train``, where a central difference
    would pay for two more; eps moves them by as little as the precision allows. Training passes draw the same dropout.
    """
    weights, selection = problem.weights, problem.selection
    state = Snapshot.take(weights)
    with problem.losses(train, TRAINING) as (train_loss, score):
        at_w = problem.gradients(train_loss + score, weights + selection)
    train_w, base = at_w[: len(weights)], at_w[len(weights) :]
    jacobian = _move_by_one_step(problem, weights, train_w)
    with without_router_losses(problem.context), problem.losses(held_out, HOLDING_OUT) as (held_out_loss, score):
        outer_grads = problem.gradients(outer(held_out_loss, score, problem.outer_loss), weights + selection)
    v, direct = outer_grads[: len(weights)], outer_grads[len(weights) :]
    u = [j * g for j, g in zip(jacobian, v, strict=True)]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in u])))
    length = torch.finfo(weights[0].dtype).eps ** (1 / 3)  # about where rounding and curvature weigh alike
    eps = length / norm if norm > 0 else length
    ahead = _selection_gradient_at(problem, train, state, u, eps)
    state.restore(weights)
    found = [d - (a - b) / eps for d, a, b in zip(direct, ahead, base, strict=True)]
    return UnrolledPass(found, train_w, train_loss.detach(), held_out_loss.detach())


@torch.no_grad()
def _move_to(weights: list[Tensor], values: list[Tensor]) -> None:
    for w, value in zip(weights, values, strict=True):
        w.copy_(value)


def _move_by_one_step(problem: Problem, weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """Moves the weights by one step of the inner optimiser; returns the diagonal of its Jacobian."""
    factor = clip_factor(gradients, problem.max_grad_norm)
    moved, jacobian = _updates(problem, weights, [g * factor for g in gradients])
    _move_to(weights, [m.detach() for m in moved])
    return [j.detach() * factor for j in jacobian]


def _updates(problem: Problem, weights: list[Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    adam = isinstance(problem.optimizer, torch.optim.AdamW)
    groups = [group for group in problem.optimizer.param_groups for _ in group["params"]]
    pairs = [
        virtual_update(w, g, problem.optimizer.state.get(p, {}), group, adam)
        for w, g, p, group in zip(weights, gradients, problem.weights, groups, strict=True)
    ]
    return [w for w, _ in pairs], [j for _, j in pairs]


def _selection_gradient_at(
    problem: Problem, train: Batch, state: Snapshot, direction: list[Tensor], eps: float
) -> list[Tensor]:
    """``d_g L_train`` at ``w + eps * direction``, with the same random numbers every time."""
    with torch.no_grad():
        for w, start, d in zip(problem.weights, state.weights, direction, strict=True):
            w.copy_(start + eps * d)
    state.restore_rng()
    return problem.train_gradients(train, problem.selection)


def exact(problem: Problem, train: Batch, held_out: Batch) -> list[Tensor]:
    """The same unrolled step differentiated by autograd, second order included. For tests and small models."""
    weights, selection = problem.weights, problem.selection
    state = Snapshot.take(weights)
    names = {id(p): name for name, p in problem.model.named_parameters()}
    leaves = [w.detach().clone().requires_grad_(True) for w in weights]
    # Fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        with collected_router_losses(problem.context) as router_losses:
            train_loss = problem.train_loss(train, _Swapped(problem.model, names, weights, leaves))
        gradients = problem.gradients(sum(router_losses, train_loss), leaves, create_graph=True)
        factor = clip_factor(gradients, problem.max_grad_norm)
        moved, _ = _updates(problem, leaves, [g * factor for g in gradients])
        held_out_loss = problem.held_out_loss(held_out, _Swapped(problem.model, names, weights, moved))
        result = problem.gradients(held_out_loss, selection)
    state.restore(weights)
    return [g.detach() for g in result]


class _Swapped(nn.Module):
    """A model with its trained weights replaced by other tensors."""

    def __init__(self, model: nn.Module, names: dict[int, str], weights: list[Tensor], values: list[Tensor]) -> None:
        super().__init__()
        self.model = [model]  # in a list: not a part of this module
        self.values = {names[id(w)]: value for w, value in zip(weights, values, strict=True)}

    def forward(self, **inputs: Any) -> Any:
        return torch.func.functional_call(self.model[0], self.values, (), inputs)


def authors_code(problem: Problem, train: Batch, held_out: Batch) -> list[Tensor]:
    """What the released GuiLoMo code computes, for comparison only.

    Gradients left uncleared between its passes turn the hypergradient into

        d_g L_train(w) + d_g L_val(w') + (eta |v| / 0.02) d_g L_train(w - eps v),   v = d_w L_train + d_w' L_val

    with ``eps = 0.01 / |v|`` and eta the learning rate. Its damage to the optimiser's state is left out.
    """
    weights, selection = problem.weights, problem.selection
    state = Snapshot.take(weights)
    at_w = problem.train_gradients(train, weights + selection)
    train_w, train_g = at_w[: len(weights)], at_w[len(weights) :]
    factor = clip_factor(train_w, problem.max_grad_norm)
    moved, _ = _updates(problem, weights, [g * factor for g in train_w])
    _move_to(weights, [m.detach() for m in moved])
    after = problem.held_out_gradients(held_out, weights + selection)
    val_w, val_g = after[: len(weights)], after[len(weights) :]
    v = [a + b for a, b in zip(train_w, val_w, strict=True)]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(d) for d in v])))
    eps = 0.01 / norm if norm > 0 else 0.01
    minus = _selection_gradient_at(problem, train, state, v, -eps)
    state.restore(weights)
    eta = problem.optimizer.param_groups[0]["lr"]
    return [t + h + eta / (2 * eps) * m for t, h, m in zip(train_g, val_g, minus, strict=True)]


HYPERGRADIENTS: dict[str, Hypergradient] = {
    "first_order": first_order,
    "unrolled": unrolled,
    "exact": exact,
    "authors_code": authors_code,
}
