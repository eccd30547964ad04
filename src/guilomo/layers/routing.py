"""What a router is: it scores the experts of one module for every token.

A router maps ``x (T, I)`` to a `Routing`. It knows nothing of ranks, packing or PEFT. It works in two steps so that a
search can add an offset between them (a log-mask per expert) without the router knowing:

    logits(x)       (T, I) -> (T, E), in float32 or better
    route(logits)   (T, E) -> Routing
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Routing:
    """The routing of T tokens over E experts. What only router losses and reports read is made when it is read.

    Attributes:
        given: ``(T, E)`` the weights below; or, without gradients, ``(T, K)`` those of the experts `kept` alone.
        logits: ``(T, E)`` the scores the weights came from.
        kept: the experts that take part: ``(T, K)`` int64 indices, or ``(T, E)`` bool; None for all.
    """

    given: Tensor
    logits: Tensor
    kept: Tensor | None = None

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


class Router(nn.Module):
    """Base of all routers. A subclass implements `logits` and `route` and says what it costs and assumes.

    Class attributes:
        static: the weights do not depend on the token, so the mixture can be merged into the frozen weight.
        dense: every expert is always chosen, so the plan's top-k does not apply.
    """

    static: bool = False
    dense: bool = False

    @staticmethod
    def parameters_for(experts: int, in_features: int) -> int:
        """Trainable parameters of this router over `experts` experts reading `in_features` features."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """``(..., I) -> (..., E)`` scores, float32 or better whatever the dtype of `x`."""
        raise NotImplementedError

    def route(self, logits: Tensor) -> Routing:
        """``(..., E)`` scores to a `Routing`."""
        raise NotImplementedError

    @property
    def score_rows(self) -> Tensor | None:
        """``(E, I)`` W if the logits are ``x W^T``, so that one product can make them beside others; else None."""
        return None

    def forward(self, x: Tensor) -> Routing:
        return self.route(self.logits(x))


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
