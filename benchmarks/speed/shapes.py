"""The sizes of one adapted linear, and weights for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
ALPHA = 16.0


@dataclass(frozen=True)
class LayerShape:
    """T tokens through a linear ``I -> O`` with E experts of the given ranks, K of them per token."""

    in_features: int
    out_features: int
    tokens: int
    ranks: tuple[int, ...]
    top_k: int
    dtype: str

    @classmethod
    def square(cls, d: int, tokens: int, ranks: tuple[int, ...], top_k: int, dtype: str) -> LayerShape:
        return cls(d, d, tokens, ranks, top_k, dtype)

    @property
    def experts(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """R, the sum of all ranks."""
        return sum(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """``alpha / r`` of every expert."""
        return tuple(ALPHA / rank for rank in self.ranks)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        """Such as ``d2048-T1024-8x8-k2-bf16``."""
        same = len(set(self.ranks)) == 1
        experts = f"{self.experts}x{self.ranks[0]}" if same else f"mixed{self.experts}R{self.rank}"
        size = f"{self.in_features}" + (f"to{self.out_features}" if self.out_features != self.in_features else "")
        return f"d{size}-T{self.tokens}-{experts}-k{self.top_k}-{self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "ranks": list(self.ranks)}


@dataclass(frozen=True)
class LayerWeights:
    """``w (O, I)`` frozen; ``a (R, I)``, ``b (O, R)`` of all experts one after another; ``router (E, I)``."""

    w: Tensor
    a: Tensor
    b: Tensor
    router: Tensor

    @classmethod
    def random(cls, shape: LayerShape, seed: int, device: torch.device) -> LayerWeights:
        """B is not zero, so that every gradient is there."""
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int, scale: float) -> Tensor:
            values = torch.randn(rows, columns, generator=generator, dtype=torch.float32) * scale
            return values.to(device, shape.torch_dtype)

        fan_in = 1 / math.sqrt(shape.in_features)
        return cls(
            w=draw(shape.out_features, shape.in_features, fan_in),
            a=draw(shape.rank, shape.in_features, fan_in),
            b=draw(shape.out_features, shape.rank, 0.02),
            router=draw(shape.experts, shape.in_features, fan_in),
        )

    def experts(self, ranks: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """``(r, I)`` and ``(O, r)`` of every expert."""
        return list(zip(self.a.split(ranks), self.b.split(ranks, dim=1), strict=True))
