"""The mixture for many rank rows: tokens sorted by expert, one pair of products per expert on the tokens that chose it.

    x, h = gather_shrink(x, a, order)                         h_e = A_e x[tokens of e]
    y = base(x)
    y = scatter_expand(y, h, weights, order, b, scales)       y[tokens of e] += B_e (s_e * weight * h_e)

Two autograd nodes around the frozen linear. The second adds into the linear's output and the first, in the backward,
into the linear's input gradient, so nothing of size (T, I) or (T, O) is made; what is made on the way has the rows of
one expert at a time. Weights multiply in rank space, and ranks are never padded. Every product sees only the ``N``
chosen pairs, so the cost does not grow with the number of experts; what it pays instead is gathering and scattering
whole rows, which is why `guilomo.layers.packed` is faster at few rank rows.

Only in `sort_tokens` do sizes depend on data: the host waits there for how many tokens chose each expert. No other path
waits. Hence not for CUDA graphs or `torch.compile`; and not for rank masks or split batches.

T tokens, I in, O out, E experts, R sum of ranks, N chosen (token, expert) pairs; of expert e: n_e pairs, rank r_e.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """The chosen (token, expert) pairs, by expert and then by token.

    Attributes:
        pairs: ``(N,)`` int64, where each pair's weight lies in ``weights.flatten()``.
        tokens: for every expert ``(n_e,)`` int64, the tokens that chose it, ascending.
        ranks: one per expert.
    """

    pairs: Tensor
    tokens: tuple[Tensor, ...]
    ranks: tuple[int, ...]

    def per_expert(self, h: Tensor) -> list[Tensor]:
        """Views ``(n_e, r_e)`` of the rank activations, which lie one expert after the other in a flat buffer."""
        shapes = [(len(tokens), rank) for tokens, rank in zip(self.tokens, self.ranks, strict=True)]
        flat = h.split([count * rank for count, rank in shapes])
        return [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]

    def per_expert_gates(self, gates: Tensor, scales: Sequence[float]) -> list[Tensor]:
        """``(n_e, 1)`` weight times scale of each expert's pairs, from ``gates (N,)``."""
        parts = gates.split([len(tokens) for tokens in self.tokens])
        return [(part * scale).unsqueeze(-1) for part, scale in zip(parts, scales, strict=True)]


def sort_tokens(chosen: Tensor, ranks: Sequence[int]) -> Order:
    """The order of ``chosen (..., E)`` bool; the host waits here for the number of tokens of each expert."""
    chosen = chosen.reshape(-1, chosen.shape[-1])
    # Of the transposed matrix the positions come by expert, then by token: sorted without sorting.
    experts, tokens = chosen.T.nonzero(as_tuple=True)
    counts = chosen.sum(0).tolist()
    return Order(tokens * chosen.shape[-1] + experts, tokens.split(counts), tuple(ranks))


def gather_shrink(x: Tensor, a: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Every expert's down-projection of the tokens that chose it.

    The backward adds into the gradient that arrives for the returned `x`. Hence that `x` may only go to operations
    whose gradient nobody else holds, such as a linear; not to one that passes its own gradient on, such as an addition.

    Args:
        x: ``(..., I)`` input of the adapted linear.
        a: ``(R, I)`` packed down-projections; the products are in its dtype, under autocast too.
        order: of the tokens of `x`.

    Returns:
        `x` itself, to be given to the frozen linear, and ``h (sum_e n_e * r_e,)``, see `Order.per_expert`.
    """
    with torch.autocast(x.device.type, enabled=False):
        passed, h = _GatherShrink.apply(x, a, order)
    # The node would otherwise ask the frozen linear for a gradient that x has no use for.
    return (passed if x.requires_grad else x), h


def scatter_expand(
    y: Tensor, h: Tensor, weights: Tensor, order: Order, b: Tensor, scales: Sequence[float], inplace: bool = True
) -> Tensor:
    """``y`` plus every expert's weighted up-projection, at the tokens that chose it.

    Args:
        y: ``(..., O)`` output of the frozen linear.
        h: what `gather_shrink` gave.
        weights: ``(..., E)`` routing weights, float32 or better.
        order: as for `gather_shrink`.
        b: ``(O, R)`` packed up-projections; the products are in the dtype of `h`.
        scales: one per expert.
        inplace: adds into `y` itself, if its memory is contiguous.
    """
    gates = weights.flatten().index_select(0, order.pairs)
    with torch.autocast(y.device.type, enabled=False):
        out: Tensor = _ScatterExpand.apply(y, h, gates, b.to(h.dtype), order, scales, inplace)
    return out


def sorted_delta(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    chosen: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """What `guilomo.layers.packed.packed_delta` gives, on its own ``(..., O)``; `chosen (..., E)` as in a `Routing`."""
    order = sort_tokens(chosen, ranks)
    _, h = gather_shrink(x, a, order)
    return scatter_expand(x.new_zeros(*x.shape[:-1], b.shape[0]), h, weights, order, b, scales)


class _GatherShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, order: Order) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a)
        ctx.order = order
        ctx.set_materialize_grads(False)
        rows = x.reshape(-1, x.shape[-1])
        shrunk = [_pick(rows, t, a.dtype) @ a_e.T for t, a_e in zip(order.tokens, a.split(order.ranks), strict=True)]
        return x.view_as(x), _flat(shrunk)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if dh is None:
            return dx, None, None
        x, a = ctx.saved_tensors
        order: Order = ctx.order
        hidden = order.per_expert(dh)
        da = None
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.shape[-1])
            da = torch.cat([dh_e.T @ _pick(rows, t, a.dtype) for t, dh_e in zip(order.tokens, hidden, strict=True)])
        if ctx.needs_input_grad[0]:
            # While second derivatives are recorded, the gradient that came in belongs to their graph.
            dx = torch.zeros_like(x) if dx is None else _owned(dx, copy=torch.is_grad_enabled())
            dx = _added(dx, order, (dh_e @ a_e for dh_e, a_e in zip(hidden, a.split(order.ranks), strict=True)))
        return dx, da, None


class _ScatterExpand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, h: Tensor, gates: Tensor, b: Tensor, order: Order, scales: Sequence[float], inplace: bool
    ) -> Tensor:
        ctx.save_for_backward(h, gates, b)
        ctx.order, ctx.scales = order, scales
        out = _owned(y, copy=not inplace)
        if out is y:
            ctx.mark_dirty(y)
        parts = zip(_gated(h, gates, order, scales), b.split(order.ranks, dim=1), strict=True)
        return _added(out, order, (gated @ b_e.T for gated, b_e in parts))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        h, gates, b = ctx.saved_tensors
        order: Order = ctx.order
        factors = order.per_expert_gates(gates, ctx.scales)
        rows = dy.reshape(-1, dy.shape[-1])
        need_h, need_gates, need_b = ctx.needs_input_grad[1:4]
        dh, dgates, db = [], [], []
        parts = (order.tokens, order.per_expert(h), factors, b.split(order.ranks, dim=1), ctx.scales)
        for tokens, h_e, factor, b_e, scale in zip(*parts, strict=True):
            dy_e, factor = _pick(rows, tokens, h.dtype), factor.to(h.dtype)
            back = dy_e @ b_e
            if need_h:
                dh.append(back * factor)
            if need_gates:
                dgates.append((back * h_e).sum(-1, dtype=gates.dtype) * scale)
            if need_b:
                db.append(dy_e.T @ (h_e * factor))
        return (
            dy,
            _flat(dh) if need_h else None,
            torch.cat(dgates) if need_gates else None,
            torch.cat(db, dim=1) if need_b else None,
            None,
            None,
            None,
        )


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _pick(rows: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n_e, D)`` rows of `tokens`, which ascend without repeats, so as many as there are rows are all of them."""
    return (rows if len(tokens) == len(rows) else rows.index_select(0, tokens)).to(dtype)


def _gated(h: Tensor, gates: Tensor, order: Order, scales: Sequence[float]) -> list[Tensor]:
    """``(n_e, r_e)`` rank activations times weight and scale, whose product is rounded once to the dtype of `h`."""
    factors = order.per_expert_gates(gates, scales)
    return [h_e * factor.to(h.dtype) for h_e, factor in zip(order.per_expert(h), factors, strict=True)]


def _owned(t: Tensor, copy: bool) -> Tensor:
    """`t` where it may be written through a view of its rows, else a contiguous copy."""
    return t.clone(memory_format=torch.contiguous_format) if copy or not t.is_contiguous() else t


def _added(out: Tensor, order: Order, parts: Iterable[Tensor]) -> Tensor:
    """`out (..., D)` with ``parts (n_e, D)`` of every expert added to its tokens, in place."""
    rows = out.view(-1, out.shape[-1])
    for tokens, part in zip(order.tokens, parts, strict=True):
        rows.index_add_(0, tokens, part.to(rows.dtype))
    return out
