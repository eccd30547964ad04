"""Per-expert dispatch, as research code computes mixtures of LoRA experts (after Mixtral's block).

For every expert: find its tokens, gather them, two small products, add the results back in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.baselines.mixture import Mixture
from benchmarks.speed.shapes import LayerShape, LayerWeights


class SparseLoop(Mixture):
    """One pair of parameters per expert. The tokens of an expert are found by `torch.where`, which waits for the host;
    published code also copies them into a Python list, which we leave out in its favour."""

    def __init__(self, base: nn.Module, shape: LayerShape, weights: LayerWeights) -> None:
        super().__init__(base, shape, weights)
        experts = weights.experts(shape.ranks)
        self.a = nn.ParameterList(a.clone() for a, _ in experts)
        self.b = nn.ParameterList(b.clone() for _, b in experts)

    def change(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], self.shape.out_features)
        slots = F.one_hot(chosen, self.shape.experts).permute(2, 1, 0)  # (E, K, T)
        for expert, (a, b, scale) in enumerate(zip(self.a, self.b, self.shape.scales, strict=True)):
            slot, token = torch.where(slots[expert])
            if not len(token):
                continue
            made = F.linear(F.linear(x[token], a), b) * scale
            out.index_add_(0, token, made * weights[token, slot, None])
        return out

    def packed(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        a = torch.cat([values[f"a.{expert}"] for expert in range(self.shape.experts)])
        return a, torch.cat([values[f"b.{expert}"] for expert in range(self.shape.experts)], dim=1)
