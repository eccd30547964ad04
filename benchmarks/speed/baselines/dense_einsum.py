"""Dense dispatch by einsum: every expert computes every token, and the weights sum a ``(T, E, O)`` tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.baselines.mixture import Mixture
from benchmarks.speed.shapes import LayerShape, LayerWeights


class DenseEinsum(Mixture):
    """One pair of parameters per expert, stacked anew in every pass; smaller ranks are filled up with zeros."""

    def __init__(self, base: nn.Module, shape: LayerShape, weights: LayerWeights) -> None:
        super().__init__(base, shape, weights)
        experts = weights.experts(shape.ranks)
        self.a = nn.ParameterList(a.clone() for a, _ in experts)
        self.b = nn.ParameterList(b.clone() for _, b in experts)

    def change(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        top = max(self.shape.ranks)
        a = torch.stack([F.pad(a, (0, 0, 0, top - len(a))) for a in self.a])
        b = torch.stack([F.pad(b, (0, top - b.shape[1])) for b in self.b])
        gates = weights.new_zeros(x.shape[0], self.shape.experts).scatter(1, chosen, weights)
        gates = gates * self.scales
        hidden = torch.einsum("ti,eri->ter", x, a)
        return torch.einsum("teo,te->to", torch.einsum("ter,eor->teo", hidden, b), gates)

    def packed(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        a = torch.cat([values[f"a.{expert}"] for expert in range(self.shape.experts)])
        return a, torch.cat([values[f"b.{expert}"] for expert in range(self.shape.experts)], dim=1)
