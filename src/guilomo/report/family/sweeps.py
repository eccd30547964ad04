"""The learning-rate sweeps: held-out loss of every rate, the chosen one filled, those at an edge of the grid marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from guilomo.report.canvas import PHONE, WIDE, canvas, panel, plain, points, words
from guilomo.report.family.labels import cut, fitted
from guilomo.report.family.reading import Comparison, Task, ordered_methods, tasks_of
from guilomo.report.palette import ACCENT, INK, LIGHT, MUTED, QUIET, WARN, house_style
from guilomo.report.reading import Method, label_of, part
from guilomo.report.units import number

_ROW, _TOP, _BOTTOM, _GAP = 19, 40, 18, 18
_LABELS, _PHONE_LABELS = 190, 118
#: A column narrower than this has no room for a loss.
_COLUMN = 40


@dataclass(frozen=True)
class Sweep:
    """The rates that one method was tried at on one task.

    Attributes:
        losses: rate -> held-out loss; None where the training diverged.
        chosen: the rate of the lowest loss.
        edge: whether a better one may lie beyond the grid.
    """

    losses: Mapping[float, float | None]
    chosen: float | None
    edge: bool


def sweep_of(method: Method, task: Task) -> Sweep | None:
    """The sweep of a method on a task; None if it had none."""
    entry = part(method, "tasks", task.name, "sweep")
    rates = [(number(one.get("learning_rate")), number(one.get("loss"))) for one in entry.get("rates") or []]
    losses = {rate: loss for rate, loss in rates if rate is not None}
    return Sweep(losses, number(entry.get("chosen")), bool(entry.get("edge"))) if losses else None


def edges_of(compare: Comparison) -> list[str]:
    """Every method and task whose chosen rate lies at an end of its grid: `DoRA on sst2 (0.003)`."""
    found = []
    for method in ordered_methods(compare):
        for task in tasks_of(compare):
            entry = part(method, "tasks", task.name, "sweep")
            if entry.get("edge"):
                rate = number(entry.get("chosen"))
                found.append(f"{label_of(method)} on {task.name}" + (f" ({rate:g})" if rate is not None else ""))
    return found


@house_style
def plot_sweeps(compare: Comparison, width: float = WIDE) -> Figure:
    """A row per method, a column per rate, a panel per task.

    Args:
        compare: the parsed compare.json.
        width: width of the figure in pixels; the panels flow into as many columns as have room for their numbers.
    """
    methods = ordered_methods(compare)
    shown = [(task, found) for task in tasks_of(compare) if (found := _sweeps(methods, task))]
    rows = [method for method in methods if any(_key(method) in found for _, found in shown)]
    left = _PHONE_LABELS if width < PHONE else _LABELS
    across = _across(width - left, [len(_grid(found)) for _, found in shown])
    bands = [shown[i : i + across] for i in range(0, len(shown), across)]
    block = _TOP + len(rows) * _ROW + _BOTTOM
    figure = canvas(width, max(block * len(bands), 1))
    each = (width - left + _GAP) / across
    for band, entries in enumerate(bands):
        top = band * block
        for row, method in enumerate(rows):
            words(figure, 0, top + _TOP + (row + 0.5) * _ROW + 4, fitted(method, left - 10, 12), 12)
        for place, (task, found) in enumerate(entries):
            x, room = left + place * each, each - _GAP
            words(figure, x, top + 14, cut(task.name, int(room / 7.5)), 13, weight="bold")
            axes = panel(figure, x, top + _TOP, room, len(rows) * _ROW)
            _draw(axes, [found.get(_key(method)) for method in rows], _grid(found), room)
    return figure


def _key(method: Method) -> int:
    return id(method)


def _sweeps(methods: Sequence[Method], task: Task) -> dict[int, Sweep]:
    found = {_key(method): sweep_of(method, task) for method in methods}
    return {key: sweep for key, sweep in found.items() if sweep}


def _grid(found: Mapping[int, Sweep]) -> list[float]:
    """Every rate that any method was tried at."""
    return sorted({rate for sweep in found.values() for rate in sweep.losses})


def _across(room: float, columns: Sequence[int]) -> int:
    """How many panels fit side by side with room for the numbers."""
    need = max(columns, default=1) * _COLUMN + _GAP
    return max(1, min(len(columns), int((room + _GAP) // need)))


def _draw(axes: Axes, sweeps: Sequence[Sweep | None], grid: Sequence[float], room: float) -> None:
    plain(axes)
    axes.set_xlim(0, len(grid))
    axes.set_ylim(max(len(sweeps), 1), 0)
    for column, rate in enumerate(grid):
        style: dict[str, Any] = {"size": points(11), "color": MUTED, "ha": "center", "va": "bottom"}
        axes.annotate(f"{rate:g}", (column + 0.5, 1), (0, 3), axes.get_xaxis_transform(), "offset points", **style)
    for row, sweep in enumerate(sweeps):
        for column, rate in enumerate(grid):
            if sweep and rate in sweep.losses:
                _draw_cell(axes, row, column, sweep, rate, room / len(grid))


def _draw_cell(axes: Axes, row: int, column: int, sweep: Sweep, rate: float, width: float) -> None:
    """One training: its loss, or a cross if it diverged; filled if it was chosen, in the warning hue at an edge."""
    loss, chosen = sweep.losses[rate], rate == sweep.chosen
    style: dict[str, Any] = {"fontsize": points(11), "ha": "center", "va": "center_baseline"}
    fill = WARN if sweep.edge else ACCENT
    box = Rectangle((column + 1.5 / width, row + 0.08), 1 - 3 / width, 0.84, linewidth=0)
    box.set(facecolor=fill if chosen else QUIET, alpha=0.92 if chosen else 0.13, gid="chosen" if chosen else None)
    axes.add_patch(box)
    text = "×" if loss is None else f"{loss:.2f}" if width < 34 else f"{loss:.3f}"
    colour = LIGHT["on-accent"] if chosen else WARN if loss is None else INK
    axes.text(column + 0.5, row + 0.53, text, color=colour, **style)
