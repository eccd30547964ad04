"""How the selection vectors moved: one small picture per projection, one line per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from guilomo.report.canvas import PHONE, WIDE, canvas, panel, points, quiet, words
from guilomo.report.curves import clean, picked
from guilomo.report.grid import Grid, grid_of
from guilomo.report.palette import MUTED, QUIET, depth_colour, house_style
from guilomo.report.reading import part

QUANTITIES = {"experts": "Expected experts", "ranks": "Expected rank per expert"}
_LEFT, _GAP, _HEIGHT, _PHONE_HEIGHT, _TOP, _BETWEEN = 30, 16, 128, 104, 40, 66


@house_style
def plot_trajectories(search: Mapping[str, Any], width: float = WIDE) -> Figure:
    """Small multiples of the expected expert count and rank of every module over the search.

    Wide pictures have a column per projection; narrow ones a row per projection.

    Args:
        search: the `search` part of results.json.
        width: width of the figure in pixels.
    """
    trajectory = part(search, "trajectory")
    shown = [quantity for quantity in QUANTITIES if trajectory.get(quantity)]
    grid = grid_of(dict.fromkeys(name for quantity in shown for name in trajectory[quantity]))
    if not shown or not grid.columns:
        return _nothing(width)
    if width < PHONE:
        return _draw_phone(trajectory, shown, grid, width)
    return _draw_wide(trajectory, shown, grid, width)


def _nothing(width: float) -> Figure:
    figure = canvas(width, 40)
    words(figure, 0, 24, "The search recorded no selection vectors.", 12, color=MUTED)
    return figure


def _draw_wide(trajectory: Mapping[str, Any], shown: Sequence[str], grid: Grid, width: float) -> Figure:
    """A row per quantity, a column per projection; at most eight columns, the rest below."""
    across = min(len(grid.columns), 8)
    bands = [range(i, min(i + across, len(grid.columns))) for i in range(0, len(grid.columns), across)]
    each = (width - _LEFT + _GAP) / across
    block = len(shown) * (_HEIGHT + _BETWEEN) + 8
    figure = canvas(width, _TOP + block * len(bands))
    _key(figure, grid, width)
    for band, columns in enumerate(bands):
        for row, quantity in enumerate(shown):
            top = _TOP + band * block + row * (_HEIGHT + _BETWEEN) + 26
            words(figure, 0, top - 24, QUANTITIES[quantity], 13, weight="bold")
            for place, column in enumerate(columns):
                axes = panel(figure, _LEFT + place * each, top + 4, each - _GAP, _HEIGHT)
                _draw_panel(axes, trajectory, quantity, grid, column)
                _limits(axes, trajectory, quantity, labels=place == 0)
                axes.set_title(grid.columns[column], fontsize=points(11), color=MUTED, loc="left", pad=3)
    return figure


def _draw_phone(trajectory: Mapping[str, Any], shown: Sequence[str], grid: Grid, width: float) -> Figure:
    """A column per quantity, a row per projection."""
    each = width / len(shown)
    block = _PHONE_HEIGHT + 46
    figure = canvas(width, _TOP + 22 + block * len(grid.columns))
    _key(figure, grid, width)
    for place, quantity in enumerate(shown):
        words(figure, place * each, _TOP + 8, QUANTITIES[quantity], 12, weight="bold")
        for column, name in enumerate(grid.columns):
            top = _TOP + 40 + column * block
            axes = panel(figure, place * each + 22, top, each - 34, _PHONE_HEIGHT)
            _draw_panel(axes, trajectory, quantity, grid, column)
            _limits(axes, trajectory, quantity, labels=True)
            if place == 0:
                words(figure, 0, top - 8, name, 11, color=MUTED)
    return figure


def _draw_panel(axes: Axes, trajectory: Mapping[str, Any], quantity: str, grid: Grid, column: int) -> None:
    """The modules of one projection, first layers first so that the deep ones lie on top."""
    quiet(axes, 10, ticks=3)
    places = sorted((row, name) for name, (row, at) in grid.places.items() if at == column)
    for row, name in places:
        steps, values = _curve(trajectory, quantity, name)
        colour = depth_colour(row, len(grid.rows))
        axes.plot(steps, values, color=colour, linewidth=1.3 if len(places) <= 12 else 0.9)
        axes.plot(steps[-1:], values[-1:], "o", color=colour, markersize=2.6, markeredgewidth=0)


def _curve(trajectory: Mapping[str, Any], quantity: str, name: str) -> tuple[list[float], list[float]]:
    values = trajectory[quantity].get(name) or []
    return picked(clean(trajectory.get("step") or range(len(values)), values))


def _limits(axes: Axes, trajectory: Mapping[str, Any], quantity: str, labels: bool) -> None:
    """One scale for all panels of a quantity, so that heights can be compared across projections."""
    curves = [_curve(trajectory, quantity, name)[1] for name in trajectory[quantity]]
    values = [value for curve in curves for value in curve] or [0.0, 1.0]
    air = 0.07 * (max(values) - min(values)) or 0.5
    axes.set_ylim(min(values) - air, max(values) + air)
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
    if not labels:
        axes.tick_params(labelleft=False)


def _key(figure: Figure, grid: Grid, width: float) -> None:
    """The depth scale: pale strokes are the first layers, dark ones the last."""
    total = len(grid.rows)
    stroke = min(14.0, 110 / max(total, 1))
    start = 66.0
    words(figure, 0, 15, f"layer {grid.rows[0]}", 11, color=QUIET)
    axes = panel(figure, start, 6, stroke * total, 10)
    axes.set_axis_off()
    axes.set_xlim(0, total)
    for row in range(total):
        axes.axvspan(row + 0.08, row + 0.92, color=depth_colour(row, total), linewidth=0)
    words(figure, start + stroke * total + 8, 15, f"layer {grid.rows[-1]}", 11, color=QUIET)
    if width >= PHONE:
        words(figure, width, 15, "horizontal axis: search step", 11, color=QUIET, ha="right")
