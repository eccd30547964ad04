"""The critical-difference diagram: mean ranks, and which methods cannot be told apart (Demšar 2006, JMLR 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from guilomo.report.canvas import PHONE, WIDE, canvas, panel, points, words
from guilomo.report.family.labels import fitted
from guilomo.report.family.reading import Comparison, is_reference, ordered_methods
from guilomo.report.palette import INK, LINE, MUTED, QUIET, house_style
from guilomo.report.reading import Method, part
from guilomo.report.units import number, plain

_ROW, _TOP, _BOTTOM, _LANE = 22, 40, 40, 11
_LABELS, _PHONE_LABELS, _VALUE = 210, 128, 50

Group = tuple[int, int]
#: First and last place of methods that cannot be told apart, in the order of their mean ranks.


def groups_of(ranks: Sequence[float], critical: float) -> list[Group]:
    """The largest runs of methods whose mean ranks differ by less than the critical difference.

    Args:
        ranks: mean ranks, lowest first.
        critical: the critical difference.

    Returns:
        First and last index of every run of at least two methods that lies in no larger one. Two methods share a run
        exactly if the difference of their mean ranks is below `critical`.
    """
    found: list[Group] = []
    for first, rank in enumerate(ranks):
        last = max(place for place in range(first, len(ranks)) if place == first or ranks[place] - rank < critical)
        if last > first and (not found or last > found[-1][1]):
            found.append((first, last))
    return found


def lanes_of(groups: Sequence[Group]) -> list[int]:
    """The first lane of every group in which no earlier one covers a place of it."""
    ends: list[int] = []
    lanes = []
    for first, last in groups:
        lane = next((i for i, end in enumerate(ends) if end < first), len(ends))
        ends[lane : lane + 1] = [last]
        lanes.append(lane)
    return lanes


def ranked(compare: Comparison) -> list[tuple[Method, float]]:
    """The methods that have a mean rank, best first.

    The critical difference belongs to the mean ranks over the blocks of Friedman's test; where the file does not have
    them, the mean ranks over tasks stand in.
    """
    blocks = part(compare, "friedman", "mean_ranks")
    ranks = [
        (method, number(blocks.get(str(method.get("name"))) if blocks else method.get("mean_rank")))
        for method in ordered_methods(compare)
    ]
    return sorted([(method, rank) for method, rank in ranks if rank is not None], key=lambda entry: entry[1])


def critical_of(compare: Comparison) -> float | None:
    """The critical difference of mean ranks, where one was computed."""
    return number(part(compare, "friedman").get("critical_difference"))


@house_style
def plot_ranks(compare: Comparison, width: float = WIDE) -> Figure:
    """A row per method with its mean rank; bars at the right join the methods that cannot be told apart.

    Args:
        compare: the parsed compare.json.
        width: width of the figure in pixels.
    """
    entries, critical = ranked(compare), critical_of(compare)
    ranks = [rank for _, rank in entries]
    groups = groups_of(ranks, critical) if critical is not None else []
    lanes = lanes_of(groups)
    figure = canvas(width, _TOP + len(entries) * _ROW + _BOTTOM)
    left = _PHONE_LABELS if width < PHONE else _LABELS
    right = _VALUE + _LANE * (max(lanes, default=-1) + 1)
    for row, (method, _) in enumerate(entries):
        weight = "bold" if is_reference(compare, method) else "normal"
        words(figure, 0, _TOP + (row + 0.5) * _ROW + 4, fitted(method, left - 20, 12), 12, weight=weight)
    axes = panel(figure, left, _TOP, width - left - right, len(entries) * _ROW)
    _draw(axes, compare, entries, critical)
    room = width - left - right
    for (first, last), lane in zip(groups, lanes, strict=True):
        _join(axes, first, last, 1 + (_VALUE + (lane + 0.5) * _LANE) / room)
    return figure


def _draw(axes: Axes, compare: Comparison, entries: Sequence[tuple[Method, float]], critical: float | None) -> None:
    """The dots on an axis that starts at rank 1, and above it the length of the critical difference."""
    last = max([2, 1 + (critical or 0), *(rank for _, rank in entries), len(entries)])
    axes.set_xlim(0.8, last + 0.2)
    axes.set_ylim(max(len(entries), 1), 0)
    axes.set_yticks([])
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(last)))
    axes.tick_params(length=0, labelsize=points(11), labelcolor=MUTED)
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("Mean rank, lower is better", fontsize=points(11), labelpad=5)
    for row, (method, rank) in enumerate(entries):
        colour = INK if is_reference(compare, method) else QUIET
        axes.plot((1, rank), (row + 0.5, row + 0.5), color=LINE, linewidth=1.0, zorder=1)
        axes.plot([rank], [row + 0.5], "o", markersize=7, color=colour, markeredgewidth=0)
        style: dict[str, Any] = {"fontsize": points(12), "color": INK, "ha": "left", "va": "center_baseline"}
        axes.annotate(plain(rank), (1, row + 0.5), (9, 0), axes.get_yaxis_transform(), "offset points", **style)
    if critical is not None:
        _draw_critical(axes, critical)


def _ticks(last: float) -> list[int]:
    """Rank 1 and multiples of a round step."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if last <= 8 * step or step == 100)
    return [1, *(rank for rank in range(step, int(last) + 1, step) if rank > 1)]


def _draw_critical(axes: Axes, critical: float) -> None:
    """A ruler as long as the critical difference, above the first row."""
    across = axes.get_xaxis_transform()
    height = 1 + 10 / (axes.get_window_extent().height or 1)
    tick = 4 / (axes.get_window_extent().height or 1)
    style: dict[str, Any] = {"transform": across, "color": INK, "linewidth": 1.2, "clip_on": False}
    axes.plot((1, 1 + critical), (height, height), gid="critical", **style)
    for end in (1, 1 + critical):
        axes.plot((end, end), (height - tick, height + tick), **style)
    text = f"critical difference {plain(critical)}"
    axes.annotate(text, (1, height), (0, 6), across, "offset points", fontsize=points(11), color=INK)


def _join(axes: Axes, first: int, last: int, x: float) -> None:
    """A bar beside the rows from `first` to `last`."""
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False, "color": INK, "linewidth": 2.6}
    axes.plot((x, x), (first + 0.3, last + 0.7), gid="group", **style)
