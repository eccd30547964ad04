"""How alike two adapters are: the cosine of the changes that they make to the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from guilomo.adapters.lora import LoraAdapter, LoraPair


def similarity(one: LoraAdapter, other: LoraAdapter) -> float:
    """Mean over modules of ``|cos(B1 A1, B2 A2)|``, in [0, 1].

    The cosine is that of the whole changes as vectors, of which Rocket (arXiv 2408.15915) asks for A and B each by
    itself; those depend on how a change is written (``B M`` and ``M^-1 A`` make the same one), this does not. It is
    made of ``r x r`` products, ``<B1 A1, B2 A2> = sum((A1 A2^T) * (B1^T B2))``, in float64. Scales do not matter to it.

    A module that only one of them changes counts as 0, as does a change that is zero.
    """
    modules = [*one.pairs, *(module for module in other.pairs if module not in one.pairs)]
    cosines = [_cosine(one.pairs.get(module), other.pairs.get(module)) for module in modules]
    return sum(cosines) / len(cosines)


def _cosine(one: LoraPair | None, other: LoraPair | None) -> float:
    if one is None or other is None:
        return 0.0
    length = (_product(one, one) * _product(other, other)).sqrt()
    return min(1.0, float(_product(one, other).abs() / length)) if length > 0 else 0.0


def _product(one: LoraPair, other: LoraPair) -> Tensor:
    """``<B1 A1, B2 A2>``."""
    a, b = one.a.double() @ other.a.double().T, one.b.double().T @ other.b.double()
    return torch.clamp((a * b).sum(), min=0) if one is other else (a * b).sum()
