"""The picture of docs/planted.md: planted against found counts, and how well each search finds them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, FAINT = "#1f2426", "#d9dcda"
COLOURS = ("#0d6570", "#e08e1b", "#87949a")
"""Of the worlds; they differ in lightness, so that they can be told apart without seeing hue."""
SIZE, DOTS_PER_INCH = (7.0, 6.6), 200
BUBBLE = 34.0
"""Area of the bubble of one module, in square points."""


def write_figure(results: dict[str, Any], path: Path) -> None:
    """One bubble panel per world and a panel of Spearman correlations, with light background."""
    figure = Figure(figsize=SIZE, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2).flatten()
    for axes, colour, name in zip(panels, COLOURS, results["summary"], strict=False):
        cells = [cell for cell in results["cells"] if cell["world"] == name]
        _bubbles(axes, name, results["summary"][name]["axis"], cells, colour)
    _bars(panels[3], results["summary"])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    bars, names = panels[3].get_legend_handles_labels()
    figure.legend(bars, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def _bubbles(axes: Axes, name: str, what: str, cells: list[dict[str, Any]], colour: str) -> None:
    pairs: Counter[tuple[int, int]] = Counter()
    for cell in cells:
        pairs.update(zip(cell["planted"].values(), cell["searches"]["guilomo"]["found"], strict=True))
    planted, found = zip(*pairs, strict=True)
    top = max(*planted, *found)
    axes.plot([0, top], [0, top], color=FAINT, zorder=0)
    axes.scatter(planted, found, s=[BUBBLE * n for n in pairs.values()], color=colour, linewidths=0)
    axes.set_title(name, fontsize=10.5, loc="left", color=INK)
    axes.set_xlabel(f"planted {what}", fontsize=9.5, color=INK)
    axes.set_ylabel(f"found {what}", fontsize=9.5, color=INK)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.7, top + 0.7)
    axes.set_ylim(-0.7, top + 0.7)


def _bars(axes: Axes, summary: dict[str, Any]) -> None:
    searches = max((list(world["spearman"]) for world in summary.values()), key=len)
    height = 0.8 / len(summary)
    for i, (name, world) in enumerate(summary.items()):
        found = [(searches.index(search), score) for search, score in world["spearman"].items()]
        y = [place + (i - (len(summary) - 1) / 2) * height for place, _ in found]
        means = [score["value"] for _, score in found]
        halves = [0.0 if score["high"] is None else score["high"] - score["value"] for _, score in found]
        axes.barh(y, means, height, xerr=halves, color=COLOURS[i], label=name, error_kw={"lw": 1, "ecolor": INK})
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(searches)), [search.replace("_", "\n") for search in searches])
    axes.invert_yaxis()
    axes.set_title("Spearman, planted and found", fontsize=10.5, loc="left", color=INK)
    axes.set_xlabel("mean and 95 % interval over seeds", fontsize=9.5, color=INK)
    axes.set_xlim(-1, 1)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
