"""Whether a variant computes the mixture: its outputs and gradients beside those of the naive loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.shapes import LayerShape, LayerWeights
from benchmarks.speed.variants import build_layer, packed, trained
from guilomo.layers.naive import naive_delta, naive_topk_weights

Quantities = dict[str, Tensor]
"""``y``, and gradients ``dx``, ``da``, ``db``, ``drouter`` for a random ``dy``."""


def errors(variant: str, shape: LayerShape, seed: int, device: torch.device) -> dict[str, float]:
    """Largest error of every quantity, relative to the largest entry of the naive loop's."""
    weights = LayerWeights.random(shape, seed, device)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(shape.tokens, shape.in_features, generator=generator).to(device, shape.torch_dtype)
    dy = torch.randn(shape.tokens, shape.out_features, generator=generator).to(device, shape.torch_dtype)
    found, wanted = _of_variant(variant, shape, weights, x, dy), _of_naive(shape, weights, x, dy)
    return {name: float((found[name] - w).abs().max() / w.abs().max()) for name, w in wanted.items()}


def _of_variant(variant: str, shape: LayerShape, weights: LayerWeights, x: Tensor, dy: Tensor) -> Quantities:
    layer = build_layer(variant, shape, weights)
    x = x.clone().requires_grad_()
    parameters = trained(layer)
    y = layer(x)
    dx, *gradients = torch.autograd.grad(y, [x, *parameters.values()], dy, allow_unused=True)
    filled = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }
    return {"y": y.detach(), "dx": dx, **{f"d{name}": g for name, g in packed(layer, filled).items()}}


def _of_naive(shape: LayerShape, weights: LayerWeights, x: Tensor, dy: Tensor) -> Quantities:
    x, a, b, router = (t.detach().clone().requires_grad_() for t in (x, weights.a, weights.b, weights.router))
    gates = naive_topk_weights(F.linear(x, router), shape.top_k)
    y = F.linear(x, weights.w) + naive_delta(x, a, b, gates, shape.ranks, shape.scales)
    gradients = torch.autograd.grad(y, [x, a, b, router], dy)
    return {"y": y.detach(), **dict(zip(("dx", "da", "db", "drouter"), gradients, strict=True))}
