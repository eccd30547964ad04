"""The layer's own choice of path beside the two it chooses from, over many sizes."""

from __future__ import annotations

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.cells.layer import inputs
from benchmarks.speed.shapes import LayerShape, LayerWeights
from benchmarks.speed.variants import build_layer, forward_backward_of

VARIANTS = ("ours", "ours:joined", "ours:sorted")
EXPERTS = (8,) * 8, (16,) * 8, (32,) * 8, (32,) * 16, (64,) * 16
"""R = 64, 128, 256, 512, 1024."""


def choice_cell(shape: LayerShape) -> Cell:
    return Cell(f"choice/{shape.name}", lambda setting: measure_choice(shape, setting))


def measure_choice(shape: LayerShape, setting: Setting) -> Result:
    weights = LayerWeights.random(shape, setting.seed, setting.device)
    x, dy = inputs(shape, setting)
    works = {v: forward_backward_of(build_layer(v, shape, weights), x, dy) for v in VARIANTS}
    return {"options": shape.to_dict(), "times": {"forward_backward": setting.time(works, "ours:joined")}}


GRID = [
    *((d, tokens, ranks, 2) for d, tokens in ((512, 256), (1024, 1024), (2048, 512)) for ranks in EXPERTS),
    *((4096, 256, ranks, 2) for ranks in EXPERTS[::2]),
    *((1024, 4096, ranks, 2) for ranks in EXPERTS[1:4]),
    *((1024, tokens, (32,) * 8, 2) for tokens in (1, 64)),
    *((1024, 1024, (32,) * 8, top_k) for top_k in (1, 4)),
]
CELLS = [
    choice_cell(LayerShape.square(d, tokens, ranks, top_k, dtype))
    for dtype in ("bf16", "fp32")
    for d, tokens, ranks, top_k in GRID
]
