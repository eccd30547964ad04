"""Mixed ranks beside uniform ranks of the same sum, in the same rounds."""

from __future__ import annotations

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.cells.layer import MIXED, counted, inputs
from benchmarks.speed.shapes import LayerShape, LayerWeights
from benchmarks.speed.variants import build_layer, forward_backward_of


def ranks_cell(d: int, tokens: int, dtype: str) -> Cell:
    uniform = LayerShape.square(d, tokens, (sum(MIXED) // len(MIXED),) * len(MIXED), 2, dtype)
    mixed = LayerShape.square(d, tokens, MIXED, 2, dtype)
    name = f"ranks/d{d}-T{tokens}-R{uniform.rank}-{dtype}"
    return Cell(name, lambda setting: measure_ranks({"uniform": uniform, "mixed": mixed}, setting))


def measure_ranks(shapes: dict[str, LayerShape], setting: Setting) -> Result:
    """Our layer, as it chooses its path by itself."""
    x, dy = inputs(shapes["uniform"], setting)
    layers = {
        name: build_layer("ours", shape, LayerWeights.random(shape, setting.seed, setting.device))
        for name, shape in shapes.items()
    }
    works = {name: forward_backward_of(layer, x, dy) for name, layer in layers.items()}
    return {
        "options": {name: shape.to_dict() for name, shape in shapes.items()},
        "counts": {name: counted(layer, x, dy) for name, layer in layers.items()},
        "times": {"forward_backward": setting.time(works, "uniform")},
    }


CELLS = [ranks_cell(d, tokens, dtype) for dtype in ("bf16", "fp32") for d, tokens in ((2048, 1024), (1024, 256))]
