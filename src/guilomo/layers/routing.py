"""What a router is: it scores the experts of one module for every token.

A router maps ``x (T, I)`` to a `Routing`. It knows nothing of ranks, packing or PEFT. It works in two steps so that a
search can add an offset between them (a log-mask per expert) without the router knowing:

    logits(x)       (T, I) -> (T, E), in float32 or better
    route(logits)   (T, E) -> Routing
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Routing:
    """The routing of T tokens over E experts.

    Attributes:
        weights: ``(T, E)`` float32 or better; what each expert's output is multiplied by, 0 where not chosen.
        probabilities: ``(T, E)`` softmax of the logits over all experts.
        chosen: ``(T, E)`` bool, the experts that take part.
        logits: ``(T, E)`` the scores the above came from.
    """

    weights: Tensor
    probabilities: Tensor
    chosen: Tensor
    logits: Tensor


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

    def forward(self, x: Tensor) -> Routing:
        return self.route(self.logits(x))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype routers compute in: float32, or float64 when the input is.

    Rounding logits to half precision changes the chosen experts of some tokens, and one changed expert dominates the
    error of its token.
    """
    return torch.promote_types(dtype, torch.float32)
