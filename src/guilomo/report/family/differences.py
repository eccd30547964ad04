"""The difference of every method to the reference with its interval, one panel per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from guilomo.report.canvas import PHONE, WIDE, canvas, panel, points, words
from guilomo.report.family.against import Against, against, higher_on, metrics_tested
from guilomo.report.family.labels import cut, fitted
from guilomo.report.family.reading import (
    Comparison,
    Result,
    Task,
    is_reference,
    ordered_methods,
    result_of,
    tasks_of,
)
from guilomo.report.palette import INK, LINE, MUTED, PAPER, QUIET, WARN, house_style
from guilomo.report.reading import Method
from guilomo.report.units import title_of, unit_of

_ROW, _TOP, _BOTTOM, _GAP, _ACROSS = 22, 40, 34, 28, 4
_LABELS, _PHONE_LABELS = 190, 128


@dataclass(frozen=True)
class Row:
    """One method on one task: its test, or else the word for why there is none."""

    method: Method
    test: Against | None
    excuse: str


@house_style
def plot_differences(compare: Comparison, metric: str | None = None, width: float = WIDE) -> Figure:
    """A dot and an interval per method and task, method minus reference: left or right of zero.

    Args:
        compare: the parsed compare.json.
        metric: in what, on the tasks where it was tested. Default: for every task what stands for its own metric.
        width: width of the figure in pixels; narrow pictures stack the tasks.
    """
    tasks = panels_of(compare, metric)
    methods = [method for method in ordered_methods(compare) if not is_reference(compare, method)]
    across = 1 if width < PHONE else min(max(len(tasks), 1), _ACROSS)
    bands = [tasks[i : i + across] for i in range(0, len(tasks), across)]
    left = _PHONE_LABELS if width < PHONE else _LABELS
    block = _TOP + len(methods) * _ROW + _BOTTOM
    figure = canvas(width, max(block * len(bands), 1))
    each = (width - left + _GAP / 2) / across
    for band, entries in enumerate(bands):
        top = band * block
        _write_names(figure, methods, top + _TOP, left)
        for place, (task, own) in enumerate(entries):
            x = left + place * each
            _head(figure, task, own, x, top, each - _GAP)
            axes = panel(figure, x, top + _TOP, each - _GAP, len(methods) * _ROW)
            _draw(axes, own, [_row(compare, method, task, own) for method in methods], min(int((each - _GAP) / 44), 6))
    return figure


def panels_of(compare: Comparison, metric: str | None) -> list[tuple[Task, str]]:
    """The tasks with the metric of their panel: the given one where it was tested, or the first of every task."""
    tested = [(task, metrics_tested(compare, task)) for task in tasks_of(compare)]
    if metric is None:
        return [(task, metrics[0]) for task, metrics in tested]
    return [(task, metric) for task, metrics in tested if metric in metrics]


def _row(compare: Comparison, method: Method, task: Task, metric: str) -> Row:
    test = against(compare, method, task, metric)
    return Row(method, test, "" if test else excuse(result_of(compare, method, task)))


def excuse(result: Result) -> str:
    """Why there is no test of a method: a short word."""
    if result.failed:
        return "failed"
    return "not tested" if result.done and not result.missing else "not done"


def _write_names(figure: Figure, methods: Sequence[Method], top: float, room: float) -> None:
    for row, method in enumerate(methods):
        words(figure, 0, top + (row + 0.5) * _ROW + 4, fitted(method, room - 10, 12), 12)


def _head(figure: Figure, task: Task, metric: str, x: float, top: float, room: float) -> None:
    """The task, and which way is better."""
    way = "right is better" if higher_on(task, metric) else "left is better"
    colour = INK if task.counted else QUIET
    words(figure, x, top + 14, cut(task.name, int(room / 7.5)), 13, weight="bold", color=colour)
    note = way if task.counted else "left out: at chance"
    words(figure, x, top + 30, f"{title_of(metric)}, {note}", 11, color=MUTED)


def _draw(axes: Axes, metric: str, rows: Sequence[Row], ticks: int) -> None:
    unit = unit_of(metric)
    axes.set_xlim(*_limits([row.test for row in rows if row.test]))
    axes.set_ylim(max(len(rows), 1), 0)
    axes.set_yticks([])
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.xaxis.set_major_locator(MaxNLocator(max(ticks, 1), steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit.bare(value)))
    axes.tick_params(length=0, labelsize=points(11), labelcolor=MUTED)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.axvline(0, color=INK, linewidth=1.0)
    for place, row in enumerate(rows):
        _draw_row(axes, place + 0.5, row)


def _draw_row(axes: Axes, y: float, row: Row) -> None:
    """Filled dots are beyond noise; hollow ones are not told apart from the reference."""
    test = row.test
    if test is None:
        colour = WARN if row.excuse == "failed" else MUTED
        style: dict[str, Any] = {"fontsize": points(11), "color": colour, "ha": "left", "va": "center_baseline"}
        axes.text(0.02, y, row.excuse, transform=axes.get_yaxis_transform(), **style)
        return
    if test.low is not None and test.high is not None:
        axes.plot((test.low, test.high), (y, y), color=test.colour, linewidth=1.4)
    decided = test.outcome in ("better", "worse")
    face = test.colour if decided else PAPER
    axes.plot([test.difference], [y], "o", markersize=5.6, mfc=face, mec=test.colour, mew=1.2)


def _limits(tests: Sequence[Against]) -> tuple[float, float]:
    """From the lowest to the highest mark with a little air, and always with zero."""
    marks = [0.0]
    for test in tests:
        marks += [mark for mark in (test.difference, test.low, test.high) if mark is not None]
    air = 0.06 * (max(marks) - min(marks)) or 0.01
    return min(marks) - air, max(marks) + air
