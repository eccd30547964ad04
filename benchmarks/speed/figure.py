"""The picture of docs/speed.md: one layer over its total rank, and a training step in all variants."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.speed.targets import by_name

INK, OURS, OTHER = "#1f2426", "#0d6570", "#87949a"
SIZE, DOTS_PER_INCH = (8.0, 3.8), 200
LABEL = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
LAYER, STEP = "layer/d2048-T1024-8x8-k2-bf16", "step/llama-bf16"
BARS = ("frozen", "peft", "ours", "ours+balance", "grouped_gemm", "sparse_loop", "dense_einsum")


def write_figure(results: Mapping[str, Any], path: Path) -> None:
    """Two bar panels with light background; a panel without results stays empty."""
    cells = by_name(results["cells"])
    figure = Figure(figsize=SIZE, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    _bars(left, cells.get(LAYER), "forward_backward", "One layer, forward and backward ÷ frozen")
    _bars(right, cells.get(STEP), "step", "Training step of a Llama ÷ PEFT LoRA")
    figure.savefig(path, metadata={"Software": None})


def _bars(axes: Axes, cell: Mapping[str, Any] | None, time: str, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    if cell is None or "error" in cell:
        axes.set_axis_off()
        return
    ratios = cell["times"][time]["ratios"]
    names = [name for name in BARS if name in ratios]
    found = [ratios[name] for name in names]
    medians = [r["median"] for r in found]
    reach = [[r["median"] - r["low"] for r in found], [r["high"] - r["median"] for r in found]]
    colours = [OURS if name.startswith("ours") else OTHER for name in names]
    axes.barh(names, medians, xerr=reach, color=colours, error_kw={"lw": 1, "ecolor": INK})
    for place, ratio in enumerate(found):
        axes.text(ratio["high"], place, f"  {ratio['median']:.2f}", va="center", fontsize=8.5, color=INK, bbox=LABEL)
    axes.axvline(1, color=INK, lw=0.8)
    axes.invert_yaxis()
    axes.tick_params(colors=INK, labelsize=9)
    noisy = ", noisy" if cell["times"][time]["noisy"] else ""
    axes.set_xlabel(f"{cell['name'].partition('/')[2]}{noisy}", fontsize=9, color=INK)
