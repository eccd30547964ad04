"""Single layers: forward, forward and backward, kernels, saved and peak bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.clocks import Work, captured
from benchmarks.speed.kernels import count
from benchmarks.speed.memory import saved_bytes
from benchmarks.speed.shapes import LayerShape, LayerWeights
from benchmarks.speed.variants import VARIANTS, build_layer, forward_backward_of, forward_of, unsupported
from guilomo.evaluation.memory import peak_bytes

MIXED = (3, 8, 1, 5, 16, 2, 19, 10)
"""Eight ranks with the sum 64, as a search finds them."""
SHAPES = [
    LayerShape.square(d, tokens, ranks, top_k, dtype)
    for dtype in ("bf16", "fp32")
    for d, tokens, ranks, top_k in (
        (512, 1, (8,) * 8, 2),
        (512, 256, (4,) * 4, 2),
        (1024, 1, (8,) * 8, 2),
        (1024, 64, (8,) * 8, 2),
        (1024, 1024, (8,) * 8, 2),
        (1024, 4096, (8,) * 8, 2),
        (2048, 1024, (8,) * 2, 1),
        (2048, 1024, (2,) * 8, 2),
        (2048, 1024, (8,) * 8, 1),
        (2048, 1024, (8,) * 8, 2),
        (2048, 1024, (8,) * 8, 4),
        (2048, 1024, MIXED, 2),
        (2048, 1024, (32,) * 8, 2),
        (2048, 512, (64,) * 16, 2),
        (4096, 1, (8,) * 8, 2),
        (4096, 512, (8,) * 8, 2),
    )
]
QUICK = LayerShape.square(512, 256, (8,) * 8, 2, "bf16")
ON_CUDA = LayerShape.square(4096, 8192, (8,) * 8, 2, "bf16")


def layer_cell(shape: LayerShape) -> Cell:
    return Cell(f"layer/{shape.name}", lambda setting: measure_layer(shape, setting))


def measure_layer(shape: LayerShape, setting: Setting, variants: Sequence[str] = VARIANTS) -> Result:
    """All variants that can compute the shape; the others with the reason why not."""
    skipped = {v: reason for v in variants if (reason := unsupported(v, shape))}
    weights = LayerWeights.random(shape, setting.seed, setting.device)
    layers = {v: build_layer(v, shape, weights) for v in variants if v not in skipped}
    x, dy = inputs(shape, setting)
    forward = {v: forward_of(layer, x) for v, layer in layers.items()}
    both = {v: forward_backward_of(layer, x, dy) for v, layer in layers.items()}
    times = {"forward": setting.time(forward, "frozen"), "forward_backward": setting.time(both, "frozen")}
    counts = {v: counted(layer, x, dy) for v, layer in layers.items()}
    found = {"options": shape.to_dict(), "skipped": skipped, "counts": counts, "times": times}
    if setting.device.type == "cuda":
        graphs, found["not_captured"] = graphs_of(both, counts)
        if "frozen" in graphs:
            times["graph"] = setting.time(graphs, "frozen")
    return found


def graphs_of(works: Mapping[str, Work], counts: Mapping[str, Any]) -> tuple[dict[str, Work], dict[str, str]]:
    """Replays of CUDA graphs, of those variants that one can hold; and why not, of the others."""
    graphs, reasons = {}, {}
    for variant, work in works.items():
        if counts[variant]["forward_backward"]["data_dependent"]:
            reasons[variant] = "the host waits for data"
            continue
        try:
            graphs[variant] = captured(work)
        except RuntimeError as error:
            reasons[variant] = str(error).partition("\n")[0]
    return graphs, reasons


def inputs(shape: LayerShape, setting: Setting) -> tuple[Tensor, Tensor]:
    """``x (T, I)``, which wants a gradient, and ``dy (T, O)``."""
    generator = torch.Generator().manual_seed(setting.seed + 1)
    x = torch.randn(shape.tokens, shape.in_features, generator=generator)
    dy = torch.randn(shape.tokens, shape.out_features, generator=generator)
    return x.to(setting.device, shape.torch_dtype).requires_grad_(), dy.to(setting.device, shape.torch_dtype)


def counted(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Any]:
    """Figures that no clock is needed for; the output, which every variant must make, counts towards the peak."""
    forward, both = forward_of(layer, x), forward_backward_of(layer, x, dy)
    with torch.no_grad():
        inference = count(forward)
    return {
        "inference": inference.to_dict(),
        "forward_backward": count(both).to_dict(),
        "saved_bytes": saved_bytes(forward, [x, *layer.parameters(), *layer.buffers()]),
        "peak_bytes": peak_bytes(both),
    }


CELLS = [layer_cell(shape) for shape in SHAPES]
