"""Every variant beside the naive loop: outputs and all gradients."""

from __future__ import annotations

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.equality import errors
from benchmarks.speed.shapes import LayerShape
from benchmarks.speed.variants import MIXTURES, unsupported

SIZES = ((8,) * 8, 2), ((3, 8, 1, 5, 16, 2), 2), ((4, 2, 7), 3), ((2, 9, 5), 1)
"""Ranks and experts per token, uniform and mixed."""


def measure_equality(setting: Setting) -> Result:
    """The largest error of every variant over all quantities, for every choice of ranks."""
    found: dict[str, dict[str, float]] = {}
    for variant in MIXTURES:
        if variant == "ours:kernels":  # half precision only: see tests/layers/test_kernels.py
            continue
        for ranks, top_k in SIZES:
            shape = LayerShape(96, 80, 200, ranks, top_k, "fp64")
            if unsupported(variant, shape):
                shape = LayerShape(96, 80, 200, ranks, top_k, "fp32")
            worst = max(errors(variant, shape, setting.seed, setting.device).values())
            found.setdefault(variant, {})[shape.name] = float(f"{worst:.2g}")
    return {"errors": found}


CELLS = [Cell("equality/naive", measure_equality)]
