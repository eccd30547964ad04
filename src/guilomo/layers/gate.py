"""Gates of the rank rows: routing weights spread over them, under a search's mask; and their gradients."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from guilomo.layers.products import as_dtype, flat_rows
from guilomo.layers.routing import Routing, without_autocast


def gate_of(h: Tensor, weights: Tensor | None, spread: Tensor, mask: Tensor | None) -> Tensor:
    """``(T, R)``, or ``(R,)`` where it is the same for all tokens; float32 or better."""
    if mask is not None and mask.dim() == 1:
        spread = spread * mask  # carries the mask through the product that is there anyway
    if weights is None:
        gate = spread[0]
    else:
        with without_autocast(h.device.type):
            gate = flat_rows(weights) @ as_dtype(spread, weights.dtype)
    if mask is not None and mask.dim() == 2:
        gate = (gate.expand(h.shape).reshape(len(mask), -1, h.shape[1]) * mask[:, None]).view(h.shape)
    return gate


def gate_of_kept(routing: Routing, spread: Tensor) -> Tensor:
    """``(T, R)`` as `_gate`, in one operation instead of three: tokens are few where this matters."""
    assert routing.kept is not None
    given, kept = routing.given.reshape(-1), routing.kept.reshape(-1)
    each = routing.kept.shape[-1]
    # A tensor that only stands for one, as in a trace, must not be kept for later calls.
    make = _multiples if type(kept) is Tensor else _multiples.__wrapped__
    starts = make(len(kept) // each, each, kept.device)
    # mode 0: the sum. F.embedding_bag is this and checks that take longer.
    gate: Tensor = torch.embedding_bag(spread.to(given.dtype), kept, starts, False, 0, False, given)[0]
    return gate


@lru_cache(maxsize=64)
def _multiples(count: int, of: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * of, of, device=device)


def gate_gradients(
    d_gate: Tensor, weights: Tensor | None, spread: Tensor, mask: Tensor | None, tokens: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the routing weights and of the rank mask from ``d_gate (T, R)``."""
    d_gate = as_dtype(d_gate, spread.dtype if weights is None else weights.dtype)
    d_mask = None
    if mask is not None:
        d_mask = d_gate * gate_of(d_gate, weights, spread, None)
        d_mask = d_mask[tokens:].sum(0) if mask.dim() == 1 else d_mask.view(len(mask), -1, mask.shape[1]).sum(1)
        d_mask = d_mask.to(mask.dtype)
        if mask.dim() == 1:
            d_gate = d_gate * mask
        else:
            d_gate = (d_gate.view(len(mask), -1, mask.shape[1]) * mask[:, None]).view(d_gate.shape)
    if weights is None:
        return None, d_mask
    return (d_gate @ as_dtype(spread, weights.dtype).t()).view(weights.shape), d_mask
