"""The picture of docs/regimes.md: test loss against the budget, for the search and its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from guilomo.evaluation import t_interval

INK, FAINT = "#1f2426", "#d9dcda"
SIZE, DOTS_PER_INCH = (7.0, 4.2), 200
STYLES = {
    "guilomo": ("GuiLoMo (searched)", "#0d6570", "o"),
    "lora": ("plain LoRA on v; q and v; all", "#e08e1b", "s"),
    "shuffled": ("searched, shuffled", "#6fa8ae", "^"),
    "random": ("random allocation", "#87949a", "D"),
}
"""By family of methods: label, colour (they differ in lightness), marker."""
SPREAD = 1.035
"""Factor between the budgets at which neighbouring families are drawn, so that they do not hide each other."""


def write_figure(results: list[dict[str, Any]], path: Path) -> None:
    """A mark per method and budget, with its interval over seeds, and a dot per seed; all have the same test rows."""
    figure = Figure(figsize=SIZE, dpi=DOTS_PER_INCH, layout="constrained", facecolor="white")
    axes = figure.subplots()
    results = sorted(results, key=lambda found: found["budget"]["parameters"])
    for place, family in enumerate(STYLES):
        _family(axes, results, family, SPREAD ** (place - (len(STYLES) - 1) / 2))
    axes.set_xscale("log")
    budgets = [found["budget"]["parameters"] for found in results]
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    axes.set_xlabel("budget, trainable parameters", color=INK)
    axes.set_ylabel("test loss, nats per token", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def _family(axes: Axes, results: list[dict[str, Any]], family: str, shift: float) -> None:
    """The methods whose name is `family`, alone or followed by a dash; a budget without one is left out."""
    label, colour, marker = STYLES[family]
    xs, means, halves = [], [], []
    for found in results:
        x = found["budget"]["parameters"] * shift
        for method in found["methods"]:
            if method["name"].partition("-")[0] != family:
                continue
            values = [run["metrics"]["loss"]["value"] for run in method["runs"]]
            axes.scatter([x] * len(values), values, s=7, color=colour, alpha=0.55, linewidths=0)
            score = t_interval(values)
            xs.append(x)
            means.append(score.value)
            halves.append(score.high - score.value)
    axes.errorbar(xs, means, halves, color=colour, marker=marker, ms=5, lw=1.2, capsize=2, label=label)
