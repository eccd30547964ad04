"""Fixed weights: the same mixture for every token (ours; the limit in which a mixture merges into one matrix)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from guilomo.errors import invalid
from guilomo.layers.options import option
from guilomo.layers.routing import NOWHERE, Place, Router, Routing, Tokens, accumulation_dtype


class FixedRouter(Router):
    """Gives every token the weights ``(E,)``; without weights, 1/E to each expert. Nothing is trained."""

    static = True
    dense = True
    searchable = True
    weights: Tensor

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        weights: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.check_options(weights=weights)
        given = [1.0 / experts] * experts if weights is None else [float(w) for w in weights]
        if len(given) != experts:
            raise invalid(
                option("weights"),
                weights,
                f"{experts} positive numbers, one per expert",
                "Leave it unset for equal weights, or give every adapted module the same number of experts.",
            )
        self._given = given
        # Not persistent: the weights are part of the adapter's config.
        self.register_buffer("weights", torch.tensor(given, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> FixedRouter:
        super()._apply(fn, recurse)
        # Weights such as 1/3 must not be rounded when a model is cast to half precision.
        dtype = torch.promote_types(self.weights.dtype, torch.float32)
        self.weights = torch.tensor(self._given, dtype=dtype).to(self.weights.device)
        return self

    @classmethod
    def check_options(cls, weights: list[float] | None = None, **options: Any) -> None:
        if weights is None:
            return
        listed = isinstance(weights, (list, tuple)) and len(weights) > 0
        if not listed or not all(isinstance(w, (int, float)) and math.isfinite(w) and w > 0 for w in weights):
            raise invalid(
                option("weights"), weights, "positive numbers, one per expert", "Leave it unset for 1/E each."
            )

    @classmethod
    def parameters_for(cls, experts: int, in_features: int, **options: Any) -> int:
        return 0

    def logits(self, x: Tensor) -> Tensor:
        scores = self.weights.to(accumulation_dtype(x.dtype)).log()
        return scores.expand(*x.shape[:-1], -1)

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        return Routing(logits.exp(), logits)
