"""The headline picture: every method at equal budget, its interval, and each seed as a small dot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from guilomo.report.canvas import PHONE, WIDE, canvas, panel, points, words
from guilomo.report.palette import ACCENT, INK, LINE, MUTED, PAPER, QUIET, house_style
from guilomo.report.reading import Estimate, Results, estimate_of, label_of, lead_of, methods_of, primary_of
from guilomo.report.units import Unit, lower_is_better, title_of, unit_of

LABELS, VALUES = 196, 160
_ROW, _PHONE_ROW = 40, 52


@dataclass(frozen=True)
class Entry:
    """One row of the picture."""

    label: str
    estimate: Estimate
    lead: bool


def entries_of(results: Results, metric: str) -> list[Entry]:
    """The methods that were measured, best first."""
    lead = lead_of(results)
    found = [(method, estimate_of(method, metric)) for method in methods_of(results)]
    entries = [Entry(label_of(method), value, method is lead) for method, value in found if value]
    sign = 1 if lower_is_better(metric) else -1
    return sorted(entries, key=lambda entry: sign * entry.estimate.mean)


@house_style
def plot_comparison(results: Results, ax: Axes | None = None, width: float = WIDE) -> Figure:
    """A dot and an interval per method on the primary metric, each seed as a small dot.

    Args:
        results: the parsed results.json.
        ax: axes to draw into, with the labels outside them. Default: a figure of its own.
        width: width of that figure in pixels.
    """
    metric = primary_of(results)
    entries = entries_of(results, metric) if metric else []
    if ax is not None:
        draw_entries(ax, entries, metric or "", stacked=False)
        return ax.get_figure(root=True) or Figure()
    if metric is None or not entries:
        return _nothing(width)
    stacked = width < PHONE
    height = len(entries) * (_PHONE_ROW if stacked else _ROW)
    figure = canvas(width, height + 48)
    left, right = (4, 4) if stacked else (LABELS, VALUES)
    draw_entries(panel(figure, left, 4, width - left - right, height), entries, metric, stacked)
    return figure


def _nothing(width: float) -> Figure:
    """A picture that says that there is nothing to compare."""
    figure = canvas(width, 40)
    words(figure, 0, 24, "No method has been measured.", 12, color=MUTED)
    return figure


def draw_entries(axes: Axes, entries: list[Entry], metric: str, stacked: bool) -> None:
    """Draws the rows; `stacked` puts the label and the value above the interval, for narrow pictures."""
    unit, height = unit_of(metric), len(entries)
    axes.set_ylim(height, 0)
    axes.set_xlim(*_range(entries))
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4 if stacked else 6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit.bare(value)))
    axes.tick_params(length=0, labelsize=points(11), labelcolor=MUTED)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    better = "further left is better" if lower_is_better(metric) else "further right is better"
    heading = title_of(metric) + (" in %" if unit.suffix else "")
    axes.set_xlabel(f"{heading} \N{MIDDLE DOT} {better}", fontsize=points(11), labelpad=5)
    for row, entry in enumerate(entries):
        _draw_entry(axes, row, entry, unit, stacked)


def _range(entries: list[Entry]) -> tuple[float, float]:
    """From the lowest to the highest mark with a little air; an axis of dots need not start at zero."""
    marks = [mark for e in entries for mark in (e.estimate.mean, *e.estimate.seeds, *(e.estimate.bounds or ()))]
    low, high = (min(marks), max(marks)) if marks else (0.0, 1.0)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def _draw_entry(axes: Axes, row: int, entry: Entry, unit: Unit, stacked: bool) -> None:
    """One method: the lead's interval runs on as a pale band, so the others can be held against it."""
    colour, estimate = (ACCENT if entry.lead else QUIET), entry.estimate
    y = row + (0.7 if stacked else 0.5)
    if estimate.bounds:
        if entry.lead:
            axes.axvspan(*estimate.bounds, color=ACCENT, alpha=0.07, linewidth=0)
        axes.plot(estimate.bounds, (y, y), color=colour, linewidth=1.6 if entry.lead else 1.3)
    seeds: dict[str, Any] = {"mec": colour, "mfc": PAPER, "mew": 0.9}
    below = [y + (0.2 if stacked else 0.24)] * len(estimate.seeds)
    axes.plot(estimate.seeds, below, "o", markersize=3.4, **seeds)
    axes.plot([estimate.mean], [y], "o", markersize=7.5, color=colour, markeredgewidth=0)
    _label_entry(axes, row, entry, unit, stacked)


def _label_entry(axes: Axes, row: int, entry: Entry, unit: Unit, stacked: bool) -> None:
    """The name at the left, the mean and its interval at the right."""
    across = axes.get_yaxis_transform()
    y = row + (0.3 if stacked else 0.5)
    style: dict[str, Any] = {"color": ACCENT if entry.lead else INK, "va": "center", "fontsize": points(12.5)}
    style["weight"] = "bold" if entry.lead else "normal"
    left, right = (0.0, 0.0) if stacked else (-points(LABELS), 10.0)
    style |= {"xycoords": across, "textcoords": "offset points", "annotation_clip": False}
    axes.annotate(entry.label, (0, y), (left, 0), ha="left", **style)
    value = unit.show(entry.estimate.mean)
    bounds = entry.estimate.bounds
    if bounds:
        value += f"  [{unit.bare(bounds[0])}, {unit.bare(bounds[1])}]"
    side = "right" if stacked else "left"
    axes.annotate(value, (1, y), (right, 0), ha=side, **style)
