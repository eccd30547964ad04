"""Which of the equal ways computes a mixture; all of them give what `guilomo.layers.naive` gives.

packed   plain torch operations: under `torch.compile`, and where second derivatives are taken
fused    two hand-written autograd nodes around the frozen linear (`guilomo.layers.fused`)
joined   the same with the frozen product in the nodes, where they may read the frozen weight
kernels  the same with the routing inside Triton kernels, on GPUs (`guilomo.layers.routed`)
sorted   tokens sorted by expert, one product per expert (`guilomo.layers.sorted`): pays at many rank rows
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from guilomo.errors import unknown

PATHS = ("packed", "fused", "joined", "sorted", "kernels")
JOINED = ("joined", "kernels")
"""The paths whose nodes make the frozen product themselves."""

SORTS_FROM = 128
"""Fewer tokens are never sorted unasked."""

_forced: list[str] = []


@contextmanager
def using(path: str) -> Iterator[None]:
    """Within, every mixture takes this path where it can; for tests and benchmarks. Not for several threads.

    Raises:
        GuilomoError: there is no such path.
    """
    if path not in PATHS:
        raise unknown("path", path, PATHS)
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The path asked for by the innermost `using`, or None."""
    return _forced[-1] if _forced else None


def sorting_pays(tokens: int, rank: int, top_k: int, experts: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the sorted path is the faster one for T tokens, K of E experts each, and R rank rows in all.

    The fused path multiplies all R rows for every token, the sorted one only those of its K experts, but gathers and
    scatters K rows for it. With many tokens the two are equal near ``R = c K / (1 - K/E)``, almost whatever the width
    of the linear is; with fewer, products over single experts become inefficient. The numbers were measured on CPUs
    (docs/speed.md). Elsewhere the path is taken only when asked for.
    """
    if device.type != "cpu" or top_k >= experts or tokens < SORTS_FROM:
        return False
    wide = dtype in (torch.float32, torch.float64)
    many_tokens, c = (512, 65) if wide else (1024, 270 if _has_tiles() else 110)
    few = max(1.0, many_tokens / tokens) ** 2
    return rank > c * few * top_k / (1 - top_k / experts)


@cache
def _has_tiles() -> bool:
    """Whether half-precision products run in AMX tiles, which makes them cheap beside gathering."""
    return torch.cpu._is_amx_tile_supported()
