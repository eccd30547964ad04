"""The fused path: two hand-written autograd nodes around the frozen linear, or with the frozen product in them.

    x, h, logits = shrink(x, A, W)      h = A x; the router's rows W are stacked under A: one product serves both
    y = frozen(x)
    y = expand(y, h, weights, ...)      y += B (gate * h), in place, with gate = weights spread over the rank rows

The frozen linear reads the x that `shrink` gives back. So the backward of `shrink` receives the gradient that the
frozen linear found for x, and adds its own part into it: nothing of the size of x or y is allocated beside what the
frozen linear makes. It is only ever called, never read, so it may be quantised, sharded or a Conv1D.

Where the frozen layer is a plain linear whose weight may be read (`Frozen`), the nodes make its product themselves,
and the other way round: first ``B (gate * h)``, then the large product on top of it. Products add to what is there at
next to no cost, so this spares a pass over y; and in the backward one over the gradient of x, for which the second node
hands the gradient of y to the first.

Linears that read the same x can share one `shrink` (several `Member`): x is read once for all, and their parts of its
gradient are added up by the products.

Saved for the backward: x, ``h (T, R)`` and ``weights (T, E)``. That the low-rank products can be accumulated into the
frozen ones is common (unsloth, LoRAFusion arXiv 2510.00206); gates in rank space, stacked router rows and the split of
rows are ours. The twin that the tests compare with is `guilomo.layers.naive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.layers.frozen_linear import Frozen
from guilomo.layers.gate import gate_gradients, gate_of, gate_of_kept
from guilomo.layers.products import (
    FEW_TOKENS,
    MANY_TOKENS,
    as_dtype,
    computation_dtype,
    few_half_precision,
    flat_rows,
    gives_float32,
    narrow_product,
    precise_product,
    stacked_rows,
    unrounded_products,
)
from guilomo.layers.routing import Routing, accumulation_dtype, without_autocast


class Member(NamedTuple):
    """What one linear wants of an x: ``a (R, I)`` packed down-projections, ``score_rows (E, I)`` of a router whose
    logits are linear, or None, and `frozen` if the nodes make the frozen product themselves."""

    a: Tensor
    score_rows: Tensor | None
    frozen: Frozen | None = None


class Shrunk(NamedTuple):
    """``h (T, R)`` in the computation's dtype and ``logits (N, ..., E)`` in float32 or better, None without router."""

    h: Tensor
    logits: Tensor | None


def shrink(
    x: Tensor,
    members: Sequence[Member],
    training_rows: int | None = None,
    drop: float = 0.0,
    in_place: bool = False,
    made: Sequence[Shrunk] | None = None,
) -> tuple[Tensor, list[Shrunk]]:
    """``A x`` and the router's logits of the same x, for every member.

    Args:
        x: ``(N, ..., I)`` input of the adapted linears, T tokens in all.
        members: the linears that read x.
        training_rows: in a split batch, how many leading rows feed the weights.
        drop: probability with which an entry of x is dropped for A; the router sees all of x. For one member only.
        in_place: whether nobody else holds the gradient that the frozen linears find for x.
        made: what a kernel has made of x already, without gradients; this gives it its backward.

    Returns:
        x for the frozen linears to read, and what each member wanted.
    """
    dtype = computation_dtype(x, members[0].a)
    seed = None if drop == 0 else int(torch.randint(2**62, (), device="cpu"))
    if not torch.is_grad_enabled():
        return x, list(made or _shrunk(x, members, dtype, _kept(x, dtype, drop, seed), widen=True))
    options = _Options(training_rows, dtype, drop, seed, in_place, tuple(m.frozen for m in members), made)
    weights = [m.frozen.weight if m.frozen is not None else None for m in members]
    both = [part for m in members for part in (m.a, m.score_rows)]
    read, *found = _Shrink.apply(x, options, *both, *weights)
    pairs = [Shrunk(*found[i : i + 2]) for i in range(0, len(found), 2)]
    # Where x has no gradient, the frozen linear must not be made to compute one.
    return (read if x.requires_grad else x), pairs


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
        out: Tensor = _Expand.apply(y, h, weights, spread, mask, b, training_rows, in_place, None)
        return out
    return _expanded(y, _gated(y, h, routing, spread, mask, b), b, in_place)


def expand_frozen(
    x: Tensor,
    frozen: Frozen,
    h: Tensor,
    routing: Routing | None,
    spread: Tensor,
    mask: Tensor | None,
    b: Tensor,
    training_rows: int | None,
) -> Tensor:
    """``frozen(x) + B (gate * h)``; as `expand` of the frozen output, for a member whose `shrink` knows `frozen`."""
    if torch.is_grad_enabled():
        weights = None if routing is None else routing.weights
        out: Tensor = _Expand.apply(x, h, weights, spread, mask, b, training_rows, False, frozen)
        return out
    return frozen.product(x, lifted(_gated(x, h, routing, spread, mask, b), b, frozen.bias))


def _shrunk(
    x: Tensor, members: Sequence[Member], dtype: torch.dtype, keep: Tensor | None, widen: bool = False
) -> list[Shrunk]:
    """What every member wants; `keep` ``(T, I)`` is the scaled dropout mask.

    With `widen`, ``A x`` may come in float32 instead of `dtype`, where that is faster.
    """
    flat = flat_rows(x)
    downs = [m.a for m in members]
    rows = [m.score_rows for m in members if m.score_rows is not None]
    read = as_dtype(flat, dtype) if keep is None else as_dtype(flat, dtype) * keep
    if not rows:
        h, logits = narrow_product(read, stacked_rows(downs, dtype)), None
    elif keep is None and gives_float32(flat, rows, dtype):
        h, logits = unrounded_products(flat, stacked_rows(downs, dtype), stacked_rows(rows))
    elif widen and keep is None and few_half_precision(flat, [*downs, *rows], dtype):
        together = narrow_product(flat.float(), torch.cat([*downs, *rows], out=flat.new_empty(0, dtype=torch.float32)))
        h, logits = together.split([sum(map(len, downs)), sum(map(len, rows))], dim=1)
    else:
        exact = x.dtype == dtype == accumulation_dtype(dtype) and all(r.dtype == dtype for r in rows)
        if exact and keep is None and len(flat) >= MANY_TOKENS:
            together = narrow_product(flat, stacked_rows([*downs, *rows], dtype))
            h, logits = together.split([sum(map(len, downs)), sum(map(len, rows))], dim=1)
        else:
            h, logits = narrow_product(read, stacked_rows(downs, dtype)), precise_product(flat, stacked_rows(rows))
    return _by_member(members, h, logits, x.shape[:-1])


def _by_member(members: Sequence[Member], h: Tensor, logits: Tensor | None, shape: torch.Size) -> list[Shrunk]:
    hs = [h] if len(members) == 1 else h.split([len(m.a) for m in members], dim=1)
    experts = [0 if m.score_rows is None else len(m.score_rows) for m in members]
    us = [None] * len(members) if logits is None else [logits] if len(members) == 1 else logits.split(experts, dim=1)
    return [
        Shrunk(own, u.reshape(*shape, count) if u is not None and count else None)
        for own, u, count in zip(hs, us, experts, strict=True)
    ]


def _kept(x: Tensor, dtype: torch.dtype, drop: float, seed: int | None) -> Tensor | None:
    """``(T, I)`` scaled dropout mask of a seed, made again in the backward instead of saved."""
    if seed is None:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty_like(flat_rows(x), dtype=dtype).bernoulli_(1 - drop, generator=generator)
    return keep.div_(1 - drop)


@dataclass
class _Options:
    training_rows: int | None
    dtype: torch.dtype
    drop: float
    seed: int | None
    in_place: bool
    frozen: tuple[Frozen | None, ...]
    made: Sequence[Shrunk] | None

    def handed_over(self) -> list[tuple[Tensor, Tensor]]:
        """``dy (T, O)`` and weight of every frozen product that the backward now running came through."""
        taken = [(frozen.take(), frozen.weight) for frozen in self.frozen if frozen is not None]
        return [(dy, weight) for dy, weight in taken if dy is not None]


class _Shrink(torch.autograd.Function):
    """Takes and gives, after x, ``a`` and ``score_rows`` of every member in turn; then the frozen weights, so that a
    change of one of them between forward and backward is noticed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: _Options, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors)
        ctx.options = options
        shrunk, options.made = options.made, None
        if shrunk is None:
            keep = _kept(x, options.dtype, options.drop, options.seed)
            shrunk = _shrunk(x, _members(tensors, len(options.frozen)), options.dtype, keep)
        return x.view_as(x), *(part for pair in shrunk for part in pair)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        options: _Options = ctx.options
        # Where second derivatives are recorded, the gradient that came in belongs to their graph.
        in_place = options.in_place and not torch.is_grad_enabled()
        handed_over = options.handed_over()
        flat = as_dtype(flat_rows(x), options.dtype)
        keep = _kept(x, options.dtype, options.drop, options.seed)
        parts = [part for part in tensors[: 2 * len(options.frozen)] if part is not None]
        present = [i for i, part in enumerate(tensors[: 2 * len(options.frozen)]) if part is not None]
        dz = _stacked_gradients([grads[i] for i in present], parts, flat)
        if ctx.needs_input_grad[0]:
            dx = _with_added(dx, dz, stacked_rows(parts, options.dtype), x, keep, len(parts[0]), in_place)
            for dy, weight in handed_over:
                dx = _onto(dx, dy, weight)
        out: list[Tensor | None] = [None] * len(tensors)
        if any(ctx.needs_input_grad[2:]):
            n = options.training_rows
            tokens = None if n is None else n * x.shape[1:-1].numel()
            found = _weight_gradients(dz, flat, keep, [len(part) for part in parts], tokens)
            for i, part, gradient in zip(present, parts, found, strict=True):
                out[i] = as_dtype(gradient, part.dtype)
        return dx, None, *out


def _members(tensors: Sequence[Tensor | None], count: int) -> list[Member]:
    pairs = [tensors[2 * i : 2 * i + 2] for i in range(count)]
    return [Member(a, rows) for a, rows in pairs if a is not None]


def _stacked_gradients(grads: Sequence[Tensor | None], parts: Sequence[Tensor], x: Tensor) -> Tensor:
    """``(T, sum of rows)``: the gradients of all products of x, 0 for one that was not used."""
    full = [
        x.new_zeros(len(x), len(part)) if gradient is None else as_dtype(flat_rows(gradient), x.dtype)
        for gradient, part in zip(grads, parts, strict=True)
    ]
    return full[0] if len(full) == 1 else torch.cat(full, dim=1)


def _onto(dx: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """``dx + dy W``, in place: `dx` was made by this backward or may be changed."""
    if torch.is_grad_enabled():
        return (flat_rows(dx) + dy @ weight).view(dx.shape)
    flat_rows(dx).addmm_(dy, weight)
    return dx


def _with_added(
    dx: Tensor | None, dz: Tensor, stacked: Tensor, x: Tensor, keep: Tensor | None, ranks: int, in_place: bool
) -> Tensor:
    """``dx + dz @ stacked`` shaped like `x`, in place if wanted and possible.

    With dropout, the columns before `ranks` have seen what `keep` kept.
    """
    if keep is not None:
        through = (dz[:, :ranks] @ stacked[:ranks]) * keep + dz[:, ranks:] @ stacked[ranks:]
    elif dx is not None and in_place and dx.dtype == dz.dtype and dx.is_contiguous():
        flat_rows(dx).addmm_(dz, stacked)
        return dx
    else:
        through = dz @ stacked
    through = through.view(x.shape)
    return as_dtype(through if dx is None else dx + through, x.dtype)


def _weight_gradient(dy: Tensor, gated: Tensor, tokens: int | None, dtype: torch.dtype) -> Tensor:
    """``dy^T gated`` over the first `tokens` rows."""
    if tokens is not None:
        dy, gated = dy[:tokens], gated[:tokens]
    return as_dtype(dy.t() @ gated, dtype)


def _weight_gradients(
    dz: Tensor, x: Tensor, keep: Tensor | None, rows: Sequence[int], tokens: int | None
) -> Sequence[Tensor]:
    """``dz^T x`` over the first `tokens` rows, split by `rows`; with dropout the first part has seen what was kept."""
    if tokens is not None:
        dz, x = dz[:tokens], x[:tokens]
    if keep is not None:
        first = dz[:, : rows[0]].t() @ (x * keep[:tokens])
        return [first, *(dz[:, rows[0] :].t() @ x).split(rows[1:])] if len(rows) > 1 else [first]
    parts: Sequence[Tensor] = (dz.t() @ x).split(list(rows))
    return parts


def _gated(x: Tensor, h: Tensor, routing: Routing | None, spread: Tensor, mask: Tensor | None, b: Tensor) -> Tensor:
    """``gate * h`` in the dtype of the products, without gradients."""
    if routing is not None and routing.only_kept and mask is None and len(h) <= FEW_TOKENS:
        gate = gate_of_kept(routing, spread)
    else:
        gate = gate_of(h, None if routing is None else routing.weights, spread, mask)
    dtype = computation_dtype(x, b)
    # `h` of few tokens may be wider than the products, see `_shrunk`.
    return h * gate if h.dtype == gate.dtype == dtype else torch.mul(h, gate, out=h.new_empty(h.shape, dtype=dtype))


def _expanded(y: Tensor, gated: Tensor, b: Tensor, in_place: bool) -> Tensor:
    narrow = as_dtype(b, gated.dtype)
    with without_autocast(y.device.type):
        if y.dtype != gated.dtype:
            delta = F.linear(gated, narrow).view(y.shape)
            return y.add_(delta) if in_place else (y + delta).to(y.dtype)
        if in_place:
            y.view(-1, y.shape[-1]).addmm_(gated, narrow.t())
            return y
        return torch.addmm(flat_rows(y), gated, narrow.t()).view(y.shape)


def lifted(gated: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``B gated + bias``, ``(T, O)``."""
    narrow = as_dtype(b, gated.dtype)
    with without_autocast(gated.device.type):
        return F.linear(gated, narrow, bias)


class _Expand(torch.autograd.Function):
    """Of y; or with `frozen` of the x that the frozen product is made of, whose gradient then takes the other way."""

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
        frozen: Frozen | None,
    ) -> Tensor:
        ctx.save_for_backward(h, weights, spread, mask, b)
        ctx.tokens = None if n is None else n * y.shape[1:-1].numel()
        ctx.frozen = frozen
        gated = h * as_dtype(gate_of(h, weights, spread, mask), h.dtype)
        if frozen is not None:
            return frozen.product(y, lifted(gated, b, frozen.bias))
        if in_place:
            ctx.mark_dirty(y)
        return _expanded(y, gated, b, in_place)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, spread, mask, b = ctx.saved_tensors
        flat = as_dtype(flat_rows(dy), h.dtype)
        gate = as_dtype(gate_of(h, weights, spread, mask), h.dtype)
        through = flat @ as_dtype(b, h.dtype)
        gated = h * gate
        d_b = _weight_gradient(flat, gated, ctx.tokens, b.dtype) if ctx.needs_input_grad[5] else None
        d_weights = d_mask = None
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[4]:
            d_weights, d_mask = gate_gradients(through * h, weights, spread, mask, ctx.tokens)
        if ctx.frozen is not None:
            ctx.frozen.hand_over(flat)
        d_y = dy if ctx.frozen is None else None
        return d_y, through * gate, d_weights, None, d_mask, d_b, None, None, None
