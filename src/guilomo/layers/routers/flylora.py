"""FlyLoRA: ranks are chosen by what a frozen sparse projection makes of the token (arXiv 2510.08396, NeurIPS 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guilomo.errors import invalid
from guilomo.layers.frozen import SparseGaussian
from guilomo.layers.options import expect_choice, expect_number, option
from guilomo.layers.routers.biased import BiasedRouter
from guilomo.layers.routers.topk import largest
from guilomo.layers.routing import NOWHERE, Place, Routing, Tokens, accumulation_dtype


class FlyLoraRouter(BiasedRouter):
    """Keeps the K largest of the scores of ``h = A x``; their weight is 1. Experts have rank 1, and nothing is trained.

    A is frozen: p Gaussian entries of deviation 1/R in every row, 0 elsewhere, made again from the seed and the
    module's name wherever it is needed. The published scale is alpha / R: set ``lora_alpha`` to that. The gradient of x
    passes through A; the released training code cuts it there.

    Options:
        score: what is largest. signed: ``h + bias`` (the released training code); abs: ``|h| + bias`` (the text);
            abs_after_bias: ``|h + bias|`` (the released small file). They choose different ranks.
        rate: of the bias, per optimiser step; 0.01 in the released training code, 0.001 in the small file.
        seed: of A. Adapters of equal seed and rank share A, and only those can be averaged.
        nonzeros: p; unset, as published: ``I K / R``.
    """

    balanced = False
    reads_ranks = True

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        score: str = "signed",
        rate: float = 0.01,
        seed: int = 0,
        nonzeros: int | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.score = top_k, score
        self._start_bias(experts, rate)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        expect_choice(option("score"), options["score"], ("signed", "abs", "abs_after_bias"))
        expect_number(option("rate"), options["rate"], at_least=0)
        expect_number(option("seed"), options["seed"], at_least=0, whole=True)
        if options["nonzeros"] is not None:
            expect_number(option("nonzeros"), options["nonzeros"], at_least=1, whole=True)

    @classmethod
    def parameters_for(cls, experts: int, in_features: int, **options: Any) -> int:
        """Below 0: a plan counts R I parameters for A, which is not trained here, and R = E."""
        return -experts * in_features

    @classmethod
    def frozen_rows(
        cls, module: str, in_features: int, experts: int, top_k: int, **options: Any
    ) -> SparseGaussian | None:
        nonzeros = options["nonzeros"] or max(1, round(in_features * top_k / experts))
        if nonzeros > in_features:
            raise invalid(option("nonzeros"), nonzeros, f"at most the {in_features} features of module {module!r}")
        return SparseGaussian(options["seed"], module, experts, in_features, nonzeros, 1 / experts)

    def logits(self, x: Tensor) -> Tensor:
        """``(..., R)``, of the rank activations: selection has no gradient."""
        return x.detach().to(accumulation_dtype(x.dtype))

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        bias = self.bias.to(logits.dtype)
        if self.score == "signed":
            scores = logits + bias
        else:
            scores = logits.abs() + bias if self.score == "abs" else (logits + bias).abs()
        _, kept = largest(scores, self.top_k)
        weights = torch.zeros_like(scores).scatter_(-1, kept, 1.0)
        return Routing(weights, scores, kept)
