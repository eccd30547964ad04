"""Grouped GEMM: the chosen (token, expert) pairs sorted by expert, and one product over all groups."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.baselines.mixture import Mixture, pad_ranks, unpad_ranks
from benchmarks.speed.shapes import LayerShape, LayerWeights

ALIGNMENT = 16
"""Bytes to which the kernel wants every row aligned."""


class GroupedGemm(Mixture):
    """Ranks are filled up to the largest, and that one to what the kernel's alignment asks for. Nothing waits for the
    host; the weights are applied in rank space, where it costs least."""

    def __init__(self, base: nn.Module, shape: LayerShape, weights: LayerWeights) -> None:
        super().__init__(base, shape, weights)
        step = ALIGNMENT // weights.a.element_size()
        a, b = pad_ranks(weights, shape.ranks, -(-max(shape.ranks) // step) * step)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    @staticmethod
    def unsupported(shape: LayerShape) -> str | None:
        if not hasattr(F, "grouped_mm"):
            return "this torch has no grouped_mm"
        if shape.dtype == "fp64":
            return "grouped_mm has no float64"
        step = ALIGNMENT // shape.torch_dtype.itemsize
        if shape.in_features % step or shape.out_features % step:
            return f"grouped_mm needs sizes that are multiples of {step}"
        return None

    def change(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        experts = chosen.flatten()
        order = experts.argsort(stable=True)
        token = order // self.shape.top_k
        sizes = torch.zeros(self.shape.experts, dtype=torch.int32, device=x.device)
        sizes.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
        ends = sizes.cumsum(0, dtype=torch.int32)
        gates = weights * self.scales[chosen]
        hidden = F.grouped_mm(x[token], self.a.transpose(1, 2), offs=ends)
        hidden = hidden * gates.flatten()[order, None]
        made = F.grouped_mm(hidden, self.b.transpose(1, 2), offs=ends)
        return made.new_zeros(x.shape[0], made.shape[1]).index_add_(0, token, made)

    def packed(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return unpad_ranks(values["a"], values["b"], self.shape.ranks)
