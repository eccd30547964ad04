"""What the compared mixtures have in common: a frozen linear, a router, and a change added to the linear's output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.speed.baselines.routing import choose
from benchmarks.speed.shapes import LayerShape, LayerWeights


class Mixture(nn.Module):
    """``y = base(x) + change(x)``. A subclass stores the experts its own way and computes the change."""

    scales: Tensor

    def __init__(self, base: nn.Module, shape: LayerShape, weights: LayerWeights) -> None:
        super().__init__()
        self.base = base
        self.shape = shape
        self.router = nn.Parameter(weights.router.clone())
        self.register_buffer("scales", weights.router.new_tensor(shape.scales), persistent=False)

    @staticmethod
    def unsupported(shape: LayerShape) -> str | None:
        """Why it cannot compute this shape; None if it can."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = choose(rows, self.router, self.shape.top_k)
        y: Tensor = self.base(x)
        return y + self.change(rows, weights.to(x.dtype), chosen).view_as(y)

    def change(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """``(T, I)`` input, ``(T, K)`` weights and chosen experts to ``(T, O)``."""
        raise NotImplementedError

    def packed(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tensors shaped like the named parameters as ``(R, I)`` and ``(O, R)``, to compare gradients."""
        raise NotImplementedError


def pad_ranks(weights: LayerWeights, ranks: tuple[int, ...], to: int) -> tuple[Tensor, Tensor]:
    """The experts as ``(E, P, I)`` and ``(E, O, P)``, every rank filled up with zeros to P.

    The filling stays zero in training: the gradient of a row of A is zero where the column of B is, and vice versa.
    """
    a = weights.a.new_zeros(len(ranks), to, weights.a.shape[1])
    b = weights.b.new_zeros(len(ranks), weights.b.shape[0], to)
    for expert, (a_e, b_e) in enumerate(weights.experts(ranks)):
        a[expert, : a_e.shape[0]] = a_e
        b[expert, :, : b_e.shape[1]] = b_e
    return a, b


def unpad_ranks(a: Tensor, b: Tensor, ranks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The inverse: ``(R, I)`` and ``(O, R)``."""
    rows = [a[expert, :rank] for expert, rank in enumerate(ranks)]
    columns = [b[expert, :, :rank] for expert, rank in enumerate(ranks)]
    return torch.cat(rows), torch.cat(columns, dim=1)
