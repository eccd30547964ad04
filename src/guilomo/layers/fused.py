"""The fused path: two hand-written autograd nodes with the frozen linear between them.

    x, h, logits = shrink(x, A, W)      h = A x; the router's rows W are stacked under A: one product serves both
    y = frozen(x)
    y = expand(y, h, weights, ...)      y += B (gate * h), in place, with gate = weights spread over the rank rows

The frozen linear reads the x that `shrink` gives back. So the backward of `shrink` receives the gradient that the
frozen linear found for x, and adds its own part into it: nothing of the size of x or y is allocated beside what the
frozen linear makes. It is only ever called, never read, so it may be quantised, sharded or a Conv1D.

Saved for the backward: x, ``h (T, R)`` and ``weights (T, E)``. That the low-rank products can be accumulated into the
frozen ones is common (unsloth, LoRAFusion arXiv 2510.00206); gates in rank space, stacked router rows and the split of
rows are ours. The twin that the tests compare with is `guilomo.layers.naive`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.layers.routing import Routing, accumulation_dtype, without_autocast

MANY_TOKENS = 64
"""From here on copying the router's rows under A costs less than reading x a second time."""
FEW_TOKENS = 16
"""Up to here a float32 product is the faster one on CPUs, the weights' conversion included."""


def shrink(
    x: Tensor, a: Tensor, score_rows: Tensor | None, training_rows: int | None, drop: float, in_place: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``A x`` and the router's logits of the same x.

    Args:
        x: ``(N, ..., I)`` input of the adapted linear, T tokens in all.
        a: ``(R, I)`` packed down-projections.
        score_rows: ``(E, I)`` of a router whose logits are linear, or None.
        training_rows: in a split batch, how many leading rows feed the two weights.
        drop: probability with which an entry of x is dropped for `a`; the router sees all of x.
        in_place: whether nobody else holds the gradient that the frozen linear finds for x.

    Returns:
        x for the frozen linear to read, ``(T, R)`` in the computation's dtype, and ``(N, ..., E)`` logits in float32 or
        better (None without `score_rows`).
    """
    dtype = computation_dtype(x, a)
    seed = None if drop == 0 else int(torch.randint(2**62, (), device="cpu"))
    if not torch.is_grad_enabled():
        h, logits = _shrunk(x, a, score_rows, dtype, _kept(x, dtype, drop, seed), widen=True)
        return x, h, logits
    read, h, logits = _Shrink.apply(x, a, score_rows, training_rows, dtype, drop, seed, in_place)
    # Where x has no gradient, the frozen linear must not be made to compute one.
    return (read if x.requires_grad else x), h, logits


def expand(
    y: Tensor,
    h: Tensor,
    routing: Routing | None,
    spread: Tensor,
    mask: Tensor | None,
    b: Tensor,
    training_rows: int | None,
    in_place: bool,
) -> Tensor:
    """``y + B (gate * h)`` with ``gate = (weights @ spread) * mask``.

    Args:
        y: ``(N, ..., O)`` output of the frozen linear, T tokens in all.
        h: ``(T, R)`` from `shrink`.
        routing: of ``(N, ...)`` tokens; None for a single expert, whose weight is 1.
        spread: ``(E, R)`` see `guilomo.layers.packed.ExpertLayout`.
        mask: of the rank rows in a search: ``(R,)``, or one for every row of the batch, ``(N, R)``.
        b: ``(O, R)`` packed up-projections.
        training_rows: in a split batch, how many leading rows feed `b`; the others feed a mask ``(R,)``.
        in_place: whether nobody else needs y.
    """
    if torch.is_grad_enabled():
        weights = None if routing is None else routing.weights
        out: Tensor = _Expand.apply(y, h, weights, spread, mask, b, training_rows, in_place)
        return out
    if routing is not None and routing.only_kept and mask is None and len(h) <= FEW_TOKENS:
        gate = _gate_of_kept(routing, spread)
    else:
        gate = _gate(h, None if routing is None else routing.weights, spread, mask)
    dtype = computation_dtype(y, b)
    # `h` of few tokens may be wider than the products, see `_shrunk`.
    gated = h * gate if h.dtype == gate.dtype == dtype else torch.mul(h, gate, out=h.new_empty(h.shape, dtype=dtype))
    return _expanded(y, gated, b, in_place)


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


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shrunk(
    x: Tensor, a: Tensor, score_rows: Tensor | None, dtype: torch.dtype, keep: Tensor | None, widen: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``(T, R)`` and ``(N, ..., E)``; `keep` ``(T, I)`` is the scaled dropout mask.

    With `widen`, ``A x`` may come in float32 instead of `dtype`, where that is faster.
    """
    flat, narrow = _flat(x), a.to(dtype)
    read = flat.to(dtype) if keep is None else flat.to(dtype) * keep
    if score_rows is None:
        return _product(read, narrow), None
    if widen and keep is None and _few(flat, a, score_rows, dtype):
        both = _product(flat.float(), torch.cat([a, score_rows], out=a.new_empty(0, dtype=torch.float32)))
        return both[:, : len(a)], both[:, len(a) :].view(*x.shape[:-1], len(score_rows))
    exact = x.dtype == dtype == score_rows.dtype == accumulation_dtype(dtype)
    if exact and keep is None and len(flat) >= MANY_TOKENS:
        both = _product(flat, torch.cat([narrow, score_rows]))
        h, logits = both[:, : len(a)], both[:, len(a) :]
    else:
        h, logits = _product(read, narrow), precise_product(flat, score_rows)
    return h, logits.view(*x.shape[:-1], len(score_rows))


def _few(x: Tensor, a: Tensor, score_rows: Tensor, dtype: torch.dtype) -> bool:
    """Whether one product in float32 is faster than one in half precision and a precise one.

    So it is on CPUs for few tokens.
    """
    half = x.dtype == a.dtype == score_rows.dtype == dtype in (torch.bfloat16, torch.float16)
    return half and len(x) <= FEW_TOKENS and x.device.type == "cpu"


def _product(x: Tensor, w: Tensor) -> Tensor:
    with without_autocast(x.device.type):
        return F.linear(x, w)


def _kept(x: Tensor, dtype: torch.dtype, drop: float, seed: int | None) -> Tensor | None:
    """``(T, I)`` scaled dropout mask of a seed, made again in the backward instead of saved."""
    if seed is None:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(_flat(x), dtype=dtype).bernoulli_(1 - drop, generator=generator)
    return keep.div_(1 - drop)


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        score_rows: Tensor | None,
        n: int | None,
        dtype: torch.dtype,
        drop: float,
        seed: int | None,
        in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, a, score_rows)
        ctx.options = n, dtype, drop, seed, in_place
        h, logits = _shrunk(x, a, score_rows, dtype, _kept(x, dtype, drop, seed))
        return x.view_as(x), h, logits

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dh: Tensor | None, d_logits: Tensor | None) -> tuple[Tensor | None, ...]:
        x, a, rows = ctx.saved_tensors
        n, dtype, drop, seed, in_place = ctx.options
        # Where second derivatives are recorded, the gradient that came in belongs to their graph.
        in_place = in_place and not torch.is_grad_enabled()
        flat = _flat(x).to(dtype)
        dh = flat.new_zeros(len(flat), len(a)) if dh is None else dh
        keep = _kept(x, dtype, drop, seed)
        if d_logits is None or rows is None:
            dz, stacked = dh, a.to(dtype)
        else:
            dz = torch.cat([dh, _flat(d_logits).to(dtype)], dim=1)
            stacked = torch.cat([a.to(dtype), rows.to(dtype)])
        if ctx.needs_input_grad[0]:
            dx = _with_added(dx, dz, stacked, x, keep, len(a), in_place)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return dx, None, None, None, None, None, None, None
        d_a, d_rows = _weight_gradients(dz, flat, keep, len(a), None if n is None else n * x.shape[1:-1].numel())
        d_rows = None if d_rows is None else d_rows.to(rows.dtype)
        return dx, d_a.to(a.dtype), d_rows, None, None, None, None, None


def _with_added(
    dx: Tensor | None, dz: Tensor, stacked: Tensor, x: Tensor, keep: Tensor | None, ranks: int, in_place: bool
) -> Tensor:
    """``dx + dz @ stacked`` shaped like `x`, in place if wanted and possible.

    With dropout, the columns before `ranks` have seen what `keep` kept.
    """
    if keep is not None:
        through = (dz[:, :ranks] @ stacked[:ranks]) * keep + dz[:, ranks:] @ stacked[ranks:]
    elif dx is not None and in_place and dx.dtype == dz.dtype and dx.is_contiguous():
        _flat(dx).addmm_(dz, stacked)
        return dx
    else:
        through = dz @ stacked
    through = through.view(x.shape)
    return through.to(x.dtype) if dx is None else (dx + through).to(x.dtype)


def _weight_gradients(
    dz: Tensor, x: Tensor, keep: Tensor | None, ranks: int, tokens: int | None
) -> tuple[Tensor, Tensor | None]:
    """``dz^T x`` over the first `tokens` rows, for the rank rows and for the router's."""
    dz, x = dz[:tokens], x[:tokens]
    if keep is not None:
        return dz[:, :ranks].t() @ (x * keep[:tokens]), dz[:, ranks:].t() @ x if dz.shape[1] > ranks else None
    both = dz.t() @ x
    return both[:ranks], both[ranks:] if len(both) > ranks else None


def _gate(h: Tensor, weights: Tensor | None, spread: Tensor, mask: Tensor | None) -> Tensor:
    """``(T, R)``, or ``(R,)`` where it is the same for all tokens; float32 or better."""
    if mask is not None and mask.dim() == 1:
        spread = spread * mask  # carries the mask through the product that is there anyway
    if weights is None:
        gate = spread[0]
    else:
        with without_autocast(h.device.type):
            gate = _flat(weights) @ spread.to(weights.dtype)
    if mask is not None and mask.dim() == 2:
        gate = (gate.expand(h.shape).reshape(len(mask), -1, h.shape[1]) * mask[:, None]).view(h.shape)
    return gate


def _gate_of_kept(routing: Routing, spread: Tensor) -> Tensor:
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


def _expanded(y: Tensor, gated: Tensor, b: Tensor, in_place: bool) -> Tensor:
    narrow = b.to(gated.dtype)
    with without_autocast(y.device.type):
        if y.dtype != gated.dtype:
            delta = F.linear(gated, narrow).view(y.shape)
            return y.add_(delta) if in_place else (y + delta).to(y.dtype)
        if in_place:
            y.view(-1, y.shape[-1]).addmm_(gated, narrow.t())
            return y
        return torch.addmm(_flat(y), gated, narrow.t()).view(y.shape)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        h: Tensor,
        weights: Tensor | None,
        spread: Tensor,
        mask: Tensor | None,
        b: Tensor,
        n: int | None,
        in_place: bool,
    ) -> Tensor:
        ctx.save_for_backward(h, weights, spread, mask, b)
        ctx.tokens = None if n is None else n * y.shape[1:-1].numel()
        if in_place:
            ctx.mark_dirty(y)
        return _expanded(y, h * _gate(h, weights, spread, mask).to(h.dtype), b, in_place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, spread, mask, b = ctx.saved_tensors
        flat = _flat(dy).to(h.dtype)
        gate = _gate(h, weights, spread, mask).to(h.dtype)
        through = flat @ b.to(h.dtype)
        gated = h * gate
        d_b = (flat[: ctx.tokens].t() @ gated[: ctx.tokens]).to(b.dtype) if ctx.needs_input_grad[5] else None
        d_weights = d_mask = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[4]:
            d_weights, d_mask = _gate_gradients(through * h, weights, spread, mask, ctx.tokens)
        return dy, through * gate, d_weights, None, d_mask, d_b, None, None


def _gate_gradients(
    d_gate: Tensor, weights: Tensor | None, spread: Tensor, mask: Tensor | None, tokens: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the routing weights and of the rank mask from ``d_gate (T, R)``."""
    d_gate = d_gate.to(spread.dtype if weights is None else weights.dtype)
    d_mask = None
    if mask is not None:
        d_mask = d_gate * _gate(d_gate, weights, spread, None)
        d_mask = d_mask[tokens:].sum(0) if mask.dim() == 1 else d_mask.view(len(mask), -1, mask.shape[1]).sum(1)
        d_mask = d_mask.to(mask.dtype)
        if mask.dim() == 1:
            d_gate = d_gate * mask
        else:
            d_gate = (d_gate.view(len(mask), -1, mask.shape[1]) * mask[:, None]).view(d_gate.shape)
    if weights is None:
        return None, d_mask
    return (d_gate @ spread.t().to(weights.dtype)).view(weights.shape), d_mask
