"""Triton kernels of the joined path on GPUs: each reads the one large tensor of its half of the layer once.

    shrink_route    x  ->  h = A x, logits = W x, the K largest, their softmax, gate * h
    expand_back     dy ->  dy B, and from it the gradients of h, of the gate and of the logits

What they replace are one product, some fifteen operations on ``(T, E)`` and one on ``(T, R)`` in each direction. The
twins that the tests compare with are the operations in `guilomo.layers.fused` and the naive model. Ours, after the
design of Punica's and S-LoRA's shrink kernels (arXiv 2310.18547, 2311.03285): the routing in the epilogue is added.

Importing this file needs `triton`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST = 16
"""Smallest side of a matrix product in Triton."""
TILES = {6144: 64, 3072: 32, 0: 16}
"""Tokens of one program, by the least number of tokens. 64 was the fastest of those tried at 8192 tokens on an H200;
the smaller ones are there to make enough programs of fewer tokens, and were not compared."""
STEP = 128
"""Features read at once."""


class ShrunkAndRouted(NamedTuple):
    """``h (T, R)``, ``gated (T, R)``, ``logits (T, E)`` float32, ``weights (T, E)`` float32, ``kept (T, K)`` int64."""

    h: Tensor
    gated: Tensor
    logits: Tensor
    weights: Tensor
    kept: Tensor


def shrink_route(x: Tensor, a: Tensor, rows: Tensor, spread: Tensor, top_k: int) -> ShrunkAndRouted:
    """``A x``, the routing of `TopKRouter` for 1 < K, and the gated rank activations, in one pass over x.

    Args:
        x: ``(T, I)`` contiguous.
        a: ``(R, I)`` in the dtype of x; rows: ``(E, I)`` of the router, in that dtype or float32.
        spread: ``(E, R)`` float32, see `guilomo.layers.packed.ExpertLayout`.
        top_k: K; the softmax runs over the K kept logits, ties go to the lowest index.
    """
    (tokens, features), ranks, experts = x.shape, len(a), len(rows)
    h, gated = x.new_empty(tokens, ranks), x.new_empty(tokens, ranks)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = torch.empty_like(logits)
    kept = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    tile = _tile(tokens)
    _shrink_route[(triton.cdiv(tokens, tile),)](
        x, a, rows, spread, h, gated, logits, weights, kept, tokens, features, ranks, experts, top_k,
        *_padded(ranks, experts), tile, STEP, num_warps=4, num_stages=4,
    )  # fmt: skip
    return ShrunkAndRouted(h, gated, logits, weights, kept)


def expand_back(dy: Tensor, b: Tensor, h: Tensor, weights: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients behind ``B (gate * h)``, in one pass over dy.

    Args:
        dy: ``(T, O)`` contiguous; b: ``(O, R)``; h: ``(T, R)``, all of one dtype.
        weights: ``(T, E)`` float32, softmax over the kept logits; spread: ``(E, R)`` float32.

    Returns:
        ``gated (T, R)`` made again, ``d_h (T, R)``, and ``d_logits (T, E)`` float32 of the softmax over the kept.
    """
    (tokens, outputs), ranks, experts = dy.shape, h.shape[1], weights.shape[1]
    gated, d_h = torch.empty_like(h), torch.empty_like(h)
    d_logits = torch.empty_like(weights)
    tile = _tile(tokens)
    _expand_back[(triton.cdiv(tokens, tile),)](
        dy, b, h, weights, spread, gated, d_h, d_logits, tokens, outputs, ranks, experts,
        *_padded(ranks, experts), tile, STEP, num_warps=4, num_stages=4,
    )  # fmt: skip
    return gated, d_h, d_logits


def _tile(tokens: int) -> int:
    return next(tile for least, tile in TILES.items() if tokens >= least)


def _padded(ranks: int, experts: int) -> tuple[int, int]:
    return max(LEAST, triton.next_power_of_2(ranks)), max(LEAST, triton.next_power_of_2(experts))


@triton.jit
def _shrink_route(
    x_ptr, a_ptr, w_ptr, spread_ptr, h_ptr, gated_ptr, logits_ptr, weights_ptr, kept_ptr,
    tokens, features, ranks, experts, top_k: tl.constexpr,
    rank_pad: tl.constexpr, expert_pad: tl.constexpr, tile: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * tile + tl.arange(0, tile)
    r, e, i = tl.arange(0, rank_pad), tl.arange(0, expert_pad), tl.arange(0, step)
    here, rank, expert = t < tokens, r < ranks, e < experts
    row = t.to(tl.int64) * features
    h = tl.zeros((tile, rank_pad), tl.float32)
    u = tl.zeros((tile, expert_pad), tl.float32)
    for start in range(0, features, step):
        c = start + i
        inside = c < features
        x = tl.load(x_ptr + row[:, None] + c[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        a = tl.load(a_ptr + r[None, :] * features + c[:, None], mask=rank[None, :] & inside[:, None], other=0.0)
        w = tl.load(w_ptr + e[None, :] * features + c[:, None], mask=expert[None, :] & inside[:, None], other=0.0)
        h = tl.dot(x, a, h, input_precision="ieee")
        if w.dtype == x.dtype:
            u = tl.dot(x, w, u, input_precision="ieee")
        else:  # a float32 router: what half precision cuts off is added by a second product
            high = w.to(x.dtype)
            u = tl.dot(x, high, u, input_precision="ieee")
            u = tl.dot(x, (w - high.to(w.dtype)).to(x.dtype), u, input_precision="ieee")
    logits_at = t[:, None] * experts + e[None, :]
    cell = here[:, None] & expert[None, :]
    tl.store(logits_ptr + logits_at, u, mask=cell)

    left = tl.where(expert[None, :], u, -float("inf"))
    top = tl.max(left, 1)
    chosen = tl.zeros((tile, expert_pad), tl.int1)
    for k in tl.static_range(top_k):
        value = tl.max(left, 1)
        first = tl.min(tl.where(left == value[:, None], e[None, :], expert_pad), 1)
        tl.store(kept_ptr + t * top_k + k, first.to(tl.int64), mask=here)
        taken = e[None, :] == first[:, None]
        chosen = chosen | taken
        left = tl.where(taken, -float("inf"), left)
    exponential = tl.where(chosen, tl.exp(u - top[:, None]), 0.0)
    weights = exponential / tl.sum(exponential, 1)[:, None]
    tl.store(weights_ptr + logits_at, weights, mask=cell)

    spread_at = e[:, None] * ranks + r[None, :]
    spread = tl.load(spread_ptr + spread_at, mask=expert[:, None] & rank[None, :], other=0.0)
    gate = tl.dot(weights, spread, input_precision="ieee")
    h_at = t[:, None] * ranks + r[None, :]
    row_rank = here[:, None] & rank[None, :]
    tl.store(h_ptr + h_at, h, mask=row_rank)
    tl.store(gated_ptr + h_at, h * gate, mask=row_rank)


@triton.jit
def _expand_back(
    dy_ptr, b_ptr, h_ptr, weights_ptr, spread_ptr, gated_ptr, d_h_ptr, d_logits_ptr,
    tokens, outputs, ranks, experts,
    rank_pad: tl.constexpr, expert_pad: tl.constexpr, tile: tl.constexpr, step: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * tile + tl.arange(0, tile)
    r, e, o = tl.arange(0, rank_pad), tl.arange(0, expert_pad), tl.arange(0, step)
    here, rank, expert = t < tokens, r < ranks, e < experts
    row = t.to(tl.int64) * outputs
    through = tl.zeros((tile, rank_pad), tl.float32)
    for start in range(0, outputs, step):
        c = start + o
        inside = c < outputs
        dy = tl.load(dy_ptr + row[:, None] + c[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptr + c[:, None] * ranks + r[None, :], mask=inside[:, None] & rank[None, :], other=0.0)
        through = tl.dot(dy, b, through, input_precision="ieee")

    h_at = t[:, None] * ranks + r[None, :]
    row_rank = here[:, None] & rank[None, :]
    h = tl.load(h_ptr + h_at, mask=row_rank, other=0.0).to(tl.float32)
    logits_at = t[:, None] * experts + e[None, :]
    cell = here[:, None] & expert[None, :]
    weights = tl.load(weights_ptr + logits_at, mask=cell, other=0.0)
    spread_at = e[:, None] * ranks + r[None, :]
    spread = tl.load(spread_ptr + spread_at, mask=expert[:, None] & rank[None, :], other=0.0)
    gate = tl.dot(weights, spread, input_precision="ieee")
    tl.store(gated_ptr + h_at, h * gate, mask=row_rank)
    tl.store(d_h_ptr + h_at, through * gate, mask=row_rank)
    d_weights = tl.dot(through * h, tl.trans(spread), input_precision="ieee")
    moved = weights * d_weights
    tl.store(d_logits_ptr + logits_at, moved - weights * tl.sum(moved, 1)[:, None], mask=cell)
