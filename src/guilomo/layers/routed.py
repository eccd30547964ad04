"""The joined path with the routing of `TopKRouter` inside Triton kernels, for GPUs.

    made = route_in_kernel(x, member, ...)      one pass over x: h, logits, the kept experts, gate * h
    _, [shrunk] = shrink(x, [member], made=[made.shrunk])
    y = expand_routed(x, frozen, made, ...)     W x onto B (gate * h); its backward makes one pass over dy for all else

Routing weights have no gradient here: that of the logits comes from the backward of `expand_routed` directly. So a loss
that reads the weights cannot be served; one that reads counts, probabilities or logits can.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guilomo.layers.frozen_linear import Frozen
from guilomo.layers.fused import Member, Shrunk, lifted
from guilomo.layers.routing import Routing

MOST_RANKS, MOST_EXPERTS = 256, 64
"""What one program holds in registers."""


class Made(NamedTuple):
    """What the kernel made of x: products, routing (its weights without gradient) and ``gated (T, R)``."""

    shrunk: Shrunk
    routing: Routing
    gated: Tensor


def kernels_serve(x: Tensor, ranks: int, experts: int, top_k: int) -> bool:
    """Whether the kernels can compute such a layer: half precision on a GPU with Triton, or Triton's interpreter."""
    if not (_has_triton() and 1 < top_k < experts <= MOST_EXPERTS and ranks <= MOST_RANKS):
        return False
    return (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)) or interpreted()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, as for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.no_grad()
def route_in_kernel(x: Tensor, member: Member, spread: Tensor, top_k: int) -> Made:
    """The products of ``x (N, ..., I)``, its routing over K of E experts and its gated rank activations.

    Args:
        x: in the dtype of the products; member: with router rows; spread: ``(E, R)`` float32.
        top_k: 1 < K < E.
    """
    from guilomo.layers.kernels import shrink_route

    assert member.score_rows is not None
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows = member.score_rows if member.score_rows.dtype == x.dtype else member.score_rows.float()
    found = shrink_route(flat, member.a.to(x.dtype).contiguous(), rows.contiguous(), spread, top_k)
    logits, weights, kept = (t.view(*x.shape[:-1], -1) for t in (found.logits, found.weights, found.kept))
    return Made(Shrunk(found.h, logits), Routing(weights, logits, kept), found.gated)


def expand_routed(x: Tensor, frozen: Frozen, shrunk: Shrunk, made: Made, spread: Tensor, b: Tensor) -> Tensor:
    """``frozen(x) + B (gate * h)`` for the gates made by the kernel.

    Args:
        x: ``(N, ..., I)``; frozen: as in the member; shrunk: what `shrink` gave for it; made: by `route_in_kernel`.
        spread: ``(E, R)`` float32; b: ``(O, R)`` in the dtype of x.
    """
    if not torch.is_grad_enabled():
        return frozen.product(x, lifted(made.gated, b, frozen.bias))
    y: Tensor = _ExpandRouted.apply(x, shrunk.h, shrunk.logits, made.gated, made.routing.weights, spread, b, frozen)
    return y


class _ExpandRouted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        logits: Tensor,
        gated: Tensor,
        weights: Tensor,
        spread: Tensor,
        b: Tensor,
        frozen: Frozen,
    ) -> Tensor:
        ctx.save_for_backward(h, weights, spread, b)
        ctx.frozen = frozen
        return frozen.product(x, lifted(gated, b, frozen.bias))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, spread, b = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        gated, d_h, d_logits = _back(flat, b.to(flat.dtype).contiguous(), h, weights.reshape(len(flat), -1), spread)
        d_b = (flat.t() @ gated).to(b.dtype) if ctx.needs_input_grad[6] else None
        ctx.frozen.hand_over(flat)
        return None, d_h, d_logits.view(weights.shape), None, None, None, d_b, None


def _back(dy: Tensor, b: Tensor, h: Tensor, weights: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `guilomo.layers.kernels.expand_back`; where second derivatives are recorded, refused.

    Raises:
        RuntimeError: gradients are to be differentiated again.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "Kernels have no second derivatives. Compute within guilomo.layers.paths.using('joined') where gradients "
            "are differentiated again."
        )
    from guilomo.layers.kernels import expand_back

    return expand_back(dy, b, h, weights, spread)
