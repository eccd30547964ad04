"""Products of x with narrow matrices, in the right dtype and precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.layers.routing import without_autocast

MANY_TOKENS = 64
"""From here on copying the router's rows under A costs less than reading x a second time."""
FEW_TOKENS = 16
"""Up to here a float32 product is the faster one on CPUs, the weights' conversion included."""


def computation_dtype(x: Tensor, a: Tensor) -> torch.dtype:
    """The dtype of the low-rank products: autocast's, or that of the weights."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return a.dtype


def precise_product(x: Tensor, w: Tensor) -> Tensor:
    """``x w^T`` in float32 or better, ``(T, I), (E, I) -> (T, E)``; on CPUs without widening a half-precision x.

    Half-precision products add up in float32 and are rounded at the end. The rounding error comes from a second product
    that starts at minus the rounded result: together they are right to 15 bits and cheaper than a float32 copy of x.
    Elsewhere than on CPUs this was never tried, so there x is widened.
    """
    wide = torch.float64 if torch.float64 in (x.dtype, w.dtype) else torch.float32
    with without_autocast(x.device.type):
        if x.device.type != "cpu" or x.dtype != w.dtype or x.dtype == wide or len(x) < MANY_TOKENS:
            return F.linear(x.to(wide), w.to(wide))
        rounded = F.linear(x, w)
        return torch.addmm(rounded, x, w.t(), beta=-1).to(wide).add_(rounded)


def flat_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the dtype. To ask first is several times cheaper than a call of ``to`` that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def stacked_rows(parts: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    if dtype is not None:
        parts = [as_dtype(part, dtype) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def few_half_precision(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether one product in float32 is faster than one in half precision and a precise one.

    So it is on CPUs for few tokens.
    """
    half = x.dtype == dtype in (torch.bfloat16, torch.float16) and all(w.dtype == dtype for w in weights)
    return half and len(x) <= FEW_TOKENS and x.device.type == "cpu"


def gives_float32(x: Tensor, rows: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether half-precision products can leave their float32 sums unrounded: on CUDA, in newer versions of torch."""
    half = x.is_cuda and x.dtype == dtype in (torch.bfloat16, torch.float16)
    known = all(r.dtype == rows[0].dtype and r.dtype in (dtype, torch.float32) for r in rows)
    return half and known and "dtype" in torch.ops.aten.mm.overloads()


def unrounded_products(x: Tensor, a: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """h in the dtype of x, and logits in float32, in one product of half-precision factors.

    What half precision cuts off float32 router rows becomes rows of its own.
    """
    parts = [a, rows.to(x.dtype)]
    if rows.dtype != x.dtype:
        parts.append((rows - parts[1].to(rows.dtype)).to(x.dtype))
    with without_autocast(x.device.type):
        together = torch.mm(x, torch.cat(parts).t(), out_dtype=torch.float32)
    h, *logits = together.split([len(part) for part in parts], dim=1)
    return h.to(x.dtype), logits[0] if len(logits) == 1 else logits[0] + logits[1]


def narrow_product(x: Tensor, w: Tensor) -> Tensor:
    with without_autocast(x.device.type):
        return F.linear(x, w)
