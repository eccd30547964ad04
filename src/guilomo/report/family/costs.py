"""Quality against what it costs: parameters or step time, one panel per task, the reference as a line and a band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from guilomo.errors import unknown
from guilomo.report.canvas import PHONE, WIDE, canvas, panel, points, quiet, words
from guilomo.report.family.against import COLOURS, against
from guilomo.report.family.labels import cut, fitted, separated
from guilomo.report.family.reading import (
    Comparison,
    Result,
    Span,
    Task,
    is_reference,
    ordered_methods,
    reference_label,
    result_of,
    tasks_of,
)
from guilomo.report.palette import INK, LINE, MUTED, PAPER, QUIET, house_style
from guilomo.report.reading import Method
from guilomo.report.units import compact, title_of

_LEFT, _NAMES, _GAP, _TOP, _BOTTOM = 38, 150, 26, 46, 46
_LINE, _LEAST = 14, 170
#: A wider range than this is drawn on a logarithmic axis.
_DECADE = 8.0


@dataclass(frozen=True)
class Cost:
    """One of the quantities quality is drawn against."""

    title: str
    relative: bool
    of: Callable[[Result], Span | None]
    show: Callable[[float], str]


def _size(result: Result) -> Span | None:
    return None if result.parameters is None else Span(result.parameters, None, None)


COSTS = {
    "parameters": Cost("Trainable parameters", False, _size, compact),
    "step": Cost("Step time", True, lambda result: result.step, lambda value: f"{value:.2f}×"),
}


@dataclass(frozen=True)
class Mark:
    """One method in one panel."""

    method: Method
    x: float
    span: tuple[float, float] | None
    y: float
    bounds: tuple[float, float] | None
    colour: str
    filled: bool


def marks_of(compare: Comparison, task: Task, what: str) -> list[Mark]:
    """The methods that have both a mean and the cost, in the order of the page."""
    found = []
    for method in ordered_methods(compare):
        result = result_of(compare, method, task)
        cost = COSTS[what].of(result)
        if cost is None or cost.middle <= 0 or result.mean is None:
            continue
        test = against(compare, method, task)
        outcome = test.outcome if test else ""
        colour = INK if is_reference(compare, method) else COLOURS.get(outcome, QUIET)
        filled = is_reference(compare, method) or outcome in ("better", "worse")
        found.append(Mark(method, cost.middle, cost.bounds, result.mean, result.bounds, colour, filled))
    return found


@house_style
def plot_costs(compare: Comparison, what: str, width: float = WIDE) -> Figure:
    """One panel per task: a dot per method with its interval, its name at the right edge.

    Args:
        compare: the parsed compare.json.
        what: `parameters` or `step`.
        width: width of the figure in pixels; narrow pictures stack the tasks.
    """
    if what not in COSTS:
        raise unknown("what", what, COSTS)
    shown = [(task, marks) for task in tasks_of(compare) if (marks := marks_of(compare, task, what))]
    across = 1 if width < PHONE or len(shown) == 1 else 2
    bands = [shown[i : i + across] for i in range(0, len(shown), across)]
    most = max((len(marks) for _, marks in shown), default=0)
    height = max(_LEAST, most * _LINE + 8)
    block = _TOP + height + _BOTTOM
    figure = canvas(width, max(block * len(bands), 1))
    each = (width + _GAP) / across
    for band, entries in enumerate(bands):
        for place, (task, marks) in enumerate(entries):
            x, y = place * each, band * block
            _head(figure, task, x, y, each - _GAP)
            axes = panel(figure, x + _LEFT, y + _TOP, each - _GAP - _LEFT - _NAMES, height)
            _draw(axes, compare, task, marks, COSTS[what])
            _name(axes, marks, height)
    return figure


def _head(figure: Figure, task: Task, x: float, y: float, room: float) -> None:
    """The task, which way is better, and whether the verdict leaves it out."""
    colour = INK if task.counted else QUIET
    words(figure, x, y + 14, cut(task.name, int(room / 7.5)), 13, weight="bold", color=colour)
    way = "higher is better" if task.higher else "lower is better"
    note = "" if task.counted else "; left out: at chance"
    words(figure, x, y + 30, f"{title_of(task.metric)}, {way}{note}", 11, color=MUTED)


def _draw(axes: Axes, compare: Comparison, task: Task, marks: Sequence[Mark], cost: Cost) -> None:
    quiet(axes)
    axes.set_ylim(*_air([mark for m in marks for mark in (m.y, *(m.bounds or ()))], 0.06))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: task.unit.bare(value)))
    axes.grid(visible=False)
    label = cost.title + (f" as a multiple of {reference_label(compare)}'s" if cost.relative else "")
    axes.set_xlabel(cut(label, 44), fontsize=points(11), labelpad=5)
    _scale(axes, [x for mark in marks for x in (mark.x, *(mark.span or ()))], cost)
    for mark in marks:
        if is_reference(compare, mark.method):
            axes.axhline(mark.y, color=INK, linewidth=0.9)
            if mark.bounds:
                axes.axhspan(*mark.bounds, color=INK, alpha=0.07, linewidth=0)
    for mark in marks:
        if mark.bounds:
            axes.plot((mark.x, mark.x), mark.bounds, color=mark.colour, linewidth=0.9, alpha=0.55)
        if mark.span:
            axes.plot(mark.span, (mark.y, mark.y), color=mark.colour, linewidth=0.9, alpha=0.55)
        face = mark.colour if mark.filled else PAPER
        axes.plot([mark.x], [mark.y], "o", markersize=5.4, mfc=face, mec=mark.colour, mew=1.2, zorder=3)


def _air(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of the values and a little more; never empty."""
    low, high = min(values), max(values)
    air = share * (high - low) or 0.05 * abs(high) or 0.5
    return low - air, high + air


def _scale(axes: Axes, values: Sequence[float], cost: Cost) -> None:
    """A linear axis wide enough for its labels to differ; a logarithmic one for ranges over most of a decade."""
    low, high = min(values), max(values)
    if high > _DECADE * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.3)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        air = max(0.08 * (high - low), 0.05 * (low + high) / 2 - (high - low) / 2)
        axes.set_xlim(low - air, high + air)
        axes.xaxis.set_major_locator(MaxNLocator(4 if axes.get_window_extent().width > 200 else 3, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.show(value)))


def _name(axes: Axes, marks: Sequence[Mark], height: float) -> None:
    """The names at the right edge, apart from each other, each with a hair line to its dot."""
    low, high = axes.get_ylim()
    pixels = [(mark.y - low) / (high - low) * height for mark in marks]
    across = axes.get_yaxis_transform()
    for mark, at in zip(marks, separated(pixels, _LINE, 6, height - 6), strict=True):
        y = low + at / height * (high - low)
        dot = axes.transLimits.transform(axes.transScale.transform((mark.x, mark.y)))[0]
        axes.plot((dot, 1.0), (mark.y, mark.y), transform=across, color=LINE, linewidth=0.6, zorder=1)
        line: dict[str, Any] = {"color": LINE, "linewidth": 0.6, "clip_on": False, "zorder": 1}
        axes.plot((1.0, 1.0 + _share(axes, 12)), (mark.y, y), transform=across, **line)
        colour = mark.colour if mark.filled else MUTED
        style: dict[str, Any] = {"fontsize": points(11), "color": colour, "ha": "left", "va": "center_baseline"}
        axes.text(1.0 + _share(axes, 16), y, fitted(mark.method, _NAMES - 18, 11), transform=across, **style)


def _share(axes: Axes, pixels: float) -> float:
    """A length in pixels as a share of the width of the axes."""
    return pixels / axes.get_window_extent().width
