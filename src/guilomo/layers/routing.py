"""What a router is: it scores the experts of one module for every token.

A router maps ``x (T, I)`` to a `Routing`. It knows nothing of ranks, packing or PEFT. It works in two steps so that a
search can add an offset between them (a log-mask per expert) without the router knowing:

    logits(x)               (T, I) -> (T, E), in float32 or better
    route(logits, tokens)   (T, E) and what else is known of the tokens -> Routing
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from guilomo.errors import GuilomoError
from guilomo.layers.frozen import SparseGaussian


@dataclass
class Routing:
    """The routing of T tokens over E experts. What only router losses and reports read is made when it is read.

    Attributes:
        given: ``(T, E)`` the weights below; or, without gradients, ``(T, K)`` those of the experts `kept` alone.
        logits: ``(T, E)`` the scores the weights came from.
        kept: the experts that take part: ``(T, K)`` int64 indices, or ``(T, E)`` bool; None for all.
        penalty: ``(T,)`` the router's own loss of each token, unweighted, in training; None where there is none.
    """

    given: Tensor
    logits: Tensor
    kept: Tensor | None = None
    penalty: Tensor | None = None

    @property
    def weights(self) -> Tensor:
        """``(T, E)`` float32 or better; what each expert's output is multiplied by, 0 where not chosen."""
        if self.only_kept:
            assert self.kept is not None
            return torch.zeros_like(self.logits).scatter_(-1, self.kept, self.given)
        return self.given

    @property
    def only_kept(self) -> bool:
        """Whether `given` are the weights of the kept experts alone."""
        return self.given.shape[-1] != self.logits.shape[-1]

    @property
    def probabilities(self) -> Tensor:
        """``(T, E)`` softmax of the logits over all experts."""
        return softmax_over_experts(self.logits)

    @property
    def chosen(self) -> Tensor:
        """``(T, E)`` bool, the experts that take part."""
        if self.kept is None:
            return torch.ones_like(self.logits, dtype=torch.bool)
        if self.kept.dtype == torch.bool:
            return self.kept
        return torch.zeros_like(self.logits, dtype=torch.bool).scatter(-1, self.kept, True)


def softmax_over_experts(scores: Tensor) -> Tensor:
    """Softmax over the last dimension of ``(..., E)``, for small E."""
    if scores.device.type != "cpu" or scores.dim() == 1:
        return scores.softmax(-1)
    # CPUs vectorise along the innermost dimension, which the softmax must not be: several times faster at E = 8.
    return scores.transpose(-1, -2).softmax(-2).transpose(-1, -2)


@dataclass(frozen=True)
class Tokens:
    """What a router may read of its tokens beside their scores.

    Attributes:
        x: ``(N, ..., I)`` the input that the scores came from.
        real: ``(N, ...)`` bool or 0/1, which tokens count; None for all. Given where `Router.reads` asks for it.
        task: ``(N,)`` int64 task of each row of the leading dimension, likewise; None where nobody gave them.
    """

    x: Tensor
    real: Tensor | None = None
    task: Tensor | None = None

    def tasks(self, count: int) -> Tensor:
        """``(N, ...)`` int64 task of every token, of `count` tasks. Where there is but one, nobody needs to give it.

        Raises:
            GuilomoError: the tasks were not given.
        """
        if self.task is None:
            if count == 1:
                return torch.zeros(self.x.shape[:-1], dtype=torch.int64, device=self.x.device)
            raise GuilomoError(MISSING_TASKS)
        return self.task.view(-1, *[1] * (self.x.dim() - 2)).expand(self.x.shape[:-1])


MISSING_TASKS = (
    "This mixture reads the task of every row, and none was given. In a recipe, give the tasks as task.parts; or "
    "call the model with router_task_ids=(B,) int64, put a column 'router_task_ids' into the token rows (with "
    "remove_unused_columns=False in Trainer's arguments), or, for generate, wrap the call in "
    "guilomo.tuner.tasks_given(model, ids)."
)


@dataclass(frozen=True)
class Place:
    """Where in the model a router stands.

    Attributes:
        depth: of its layer, from 0 for the first adapted one to 1 for the last.
        shared: the part that it has in common with other routers, see `Router.shared`.
    """

    depth: float = 0.0
    shared: nn.Module | None = None


NOWHERE = Place()
"""For a router outside a model."""


class Router(nn.Module):
    """Base of all routers. A subclass implements `logits` and `route` and says what it costs and assumes.

    Constructors take ``(in_features, experts, top_k, place)``; keyword-only arguments beside these are the router's
    options, by the names that users write in ``router_options``, with their defaults. Parameters and buffers lie
    directly on the router and on its shared part: PEFT finds the adapter's name in a key only one level above the end.

    Class attributes:
        static: the weights do not depend on the token, so the mixture can be merged into the frozen weight.
        static_by_task: they depend on nothing but the token's task, so it can be merged for one task.
        dense: every expert is always chosen, so the plan's top-k does not apply.
        searchable: an offset of the logits takes weight from an expert and gives it to the others, as searches need.
        own_loss: whether training gives a `Routing.penalty`, for ``router_loss_coefficient`` to weigh.
        balanced: whether balance losses and the z-loss can do anything for it.
        reads: the optional fields of `Tokens` that it reads.
        reads_ranks: the scores are made of the rank activations, one for each expert of rank 1: `logits` is given
            ``A x (..., R)`` in place of x.
    """

    static: bool = False
    static_by_task: bool = False
    dense: bool = False
    searchable: bool = False
    own_loss: bool = False
    balanced: bool = True
    reads: ClassVar[frozenset[str]] = frozenset()
    reads_ranks: bool = False

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Refuses values of options that cannot work; all options are given.

        Raises:
            GuilomoError: naming the option, the value and what is allowed.
        """

    @classmethod
    def parameters_for(cls, experts: int, in_features: int, **options: Any) -> int:
        """Trainable parameters of this router over `experts` experts reading `in_features` features, shared ones not
        counted."""
        raise NotImplementedError

    def follow(self, progress: float) -> None:
        """Told how far the training is, from 0 to 1, before every step of the optimiser: for routers of stages."""

    @classmethod
    def shared_key(cls, experts: int, in_features: int) -> Hashable | None:
        """Routers of one adapter with equal keys have one shared part; None for routers that share nothing."""
        return None

    @classmethod
    def shared(cls, experts: int, in_features: int, **options: Any) -> nn.Module:
        """Makes the part that all routers of one key have in common: saved, counted and optimised once."""
        raise NotImplementedError

    @classmethod
    def shared_parameters(cls, experts: int, in_features: int, **options: Any) -> int:
        """Trainable parameters of `shared`."""
        return 0

    @classmethod
    def frozen_rows(
        cls, module: str, in_features: int, experts: int, top_k: int, **options: Any
    ) -> SparseGaussian | None:
        """The recipe of the rank rows ``A (R, I)`` of a module, for routers under which A is not trained."""
        return None

    def logits(self, x: Tensor) -> Tensor:
        """``(..., I) -> (..., E)`` scores, float32 or better whatever the dtype of `x`."""
        raise NotImplementedError

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        """``(..., E)`` scores, and what else is known of their tokens, to a `Routing`."""
        raise NotImplementedError

    def observe(self, routing: Routing, tokens: Tokens) -> None:
        """Told of every routing in training once, recomputations left out."""

    @property
    def score_rows(self) -> Tensor | None:
        """``(E, I)`` W if the logits are ``x W^T``, so that one product can make them beside others; else None."""
        return None

    def forward(self, x: Tensor) -> Routing:
        return self.route(self.logits(x), Tokens(x))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype routers compute in: float32, or float64 when the input is.

    Rounding logits to half precision changes the chosen experts of some tokens, and one changed expert dominates the
    error of its token.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Within, products stay in the dtype of their factors."""
    # Entering autocast costs as much as a product for one token.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
