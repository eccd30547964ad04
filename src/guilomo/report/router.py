"""Router load: how the tokens of a module are shared among its experts, and which experts get none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from guilomo.report.canvas import WIDE, canvas, panel, plain, points, words
from guilomo.report.grid import Grid, grid_of
from guilomo.report.palette import ACCENT, LINE, MUTED, QUIET, WARN, house_style
from guilomo.report.reading import Method, allocation_of, label_of, router_of, runs_of
from guilomo.report.units import number

_LEFT, _ROW, _HEADING_LINE = 30, 18, 13


@dataclass(frozen=True)
class Health:
    """Router statistics of one method over all modules and seeds.

    Attributes:
        entropy: mean normalised entropy of the load; 1 means all experts are used alike.
        least: the lowest of these entropies.
        largest: the largest share of one expert, among modules with at least two.
        dead: experts without tokens, summed over modules, mean over seeds.
        modules: modules with at least one dead expert, over all seeds.
    """

    entropy: float | None
    least: float | None
    largest: float | None
    dead: float
    modules: tuple[str, ...]


def health_of(method: Method) -> Health | None:
    """The router statistics of a method; `None` if it has no router."""
    routers = [run["router"] for run in runs_of(method) if run.get("router")]
    if not routers:
        return None
    entropies = [number(v) for router in routers for v in (router.get("entropy") or {}).values()]
    known = [value for value in entropies if value is not None]
    loads = [load for router in routers for load in (router.get("load") or {}).values() if len(load) > 1]
    dead = [{name: int(n) for name, n in (router.get("dead") or {}).items() if n} for router in routers]
    return Health(
        entropy=fmean(known) if known else None,
        least=min(known, default=None),
        largest=max((max(load) for load in loads), default=None),
        dead=fmean(sum(found.values()) for found in dead),
        modules=tuple(dict.fromkeys(name for found in dead for name in found)),
    )


@house_style
def plot_router_load(methods: Sequence[Method], width: float = WIDE) -> Figure:
    """One bar per module, cut into the shares of its experts; a cross marks modules with dead experts.

    Args:
        methods: the methods to draw, one block each; those without a router are left out.
        width: width of the figure in pixels.
    """
    shown = [(method, router_of(method)) for method in methods if router_of(method).get("load")]
    if not shown:
        figure = canvas(width, 40)
        words(figure, 0, 24, "No method of this run has a router.", 12, color=MUTED)
        return figure
    grids = [_grid_of(method, router) for method, router in shown]
    tops = [_top(grid, width) for grid in grids]
    heights = [top + len(grid.rows) * _ROW + 14 for grid, top in zip(grids, tops, strict=True)]
    figure = canvas(width, sum(heights))
    for place, (method, router) in enumerate(shown):
        y, grid = sum(heights[:place]), grids[place]
        words(figure, 0, y + 14, label_of(method), 13, weight="bold")
        axes = panel(figure, _LEFT, y + tops[place], width - _LEFT, len(grid.rows) * _ROW)
        _draw_bars(axes, grid, router, (width - _LEFT) / len(grid.columns))
    return figure


def _grid_of(method: Method, router: Mapping[str, Any]) -> Grid:
    """The places of all planned modules, so that the picture lines up with the allocation's."""
    plan = allocation_of(method)
    return grid_of([*(plan.modules if plan else ()), *(n for n in router["load"] if not plan or n not in plan.modules)])


def _top(grid: Grid, width: float) -> float:
    """Height of the title and the column names."""
    headings = grid.headings((width - _LEFT) / len(grid.columns))
    return 30 + _HEADING_LINE * (1 + max(name.count("\n") for name in headings)) + 6


def _draw_bars(axes: Axes, grid: Grid, router: Mapping[str, Any], width: float) -> None:
    """All modules of one method; `width` is the width of a column in pixels."""
    plain(axes)
    axes.set_xlim(0, len(grid.columns))
    axes.set_ylim(len(grid.rows), 0)
    dead = router.get("dead") or {}
    for name, (row, column) in grid.places.items():
        _draw_bar(axes, row, column, router["load"].get(name) or [], width)
        if dead.get(name):
            mark = f"×{dead[name]}" if dead[name] > 1 else "×"
            axes.text(column + 1 - 15 / width, row + 0.5, mark, color=WARN, weight="bold", **_middle(12, "left"))
    across = axes.get_xaxis_transform()
    for column, heading in enumerate(grid.headings(width)):
        size = points(11 if width >= 44 else 10)
        above = (column, 1), (0, 5), across, "offset points"
        axes.annotate(heading, *above, size=size, color=MUTED, ha="left", va="bottom")
    for row, label in enumerate(grid.rows):
        axes.text(-8 / width, row + 0.5, label, color=QUIET, **_middle(11, "right"))


def _middle(pixels: float, side: str) -> dict[str, Any]:
    return {"fontsize": points(pixels), "ha": side, "va": "center_baseline"}


def _draw_bar(axes: Axes, row: int, column: int, load: Sequence[float], width: float) -> None:
    """The shares of one module's experts in their order, dark and pale in turn; a hair line if none."""
    room = 1 - 18 / width
    if not load:
        axes.plot((column, column + room), (row + 0.5, row + 0.5), color=LINE, linewidth=0.8)
    start, total = 0.0, sum(load) or 1.0
    for expert, share in enumerate(load):
        part = share / total * room
        # A hair of background between neighbours, but never more than the share itself.
        visible = max(part - 1 / width, part * 0.5)
        tone = 0.85 if expert % 2 == 0 else 0.5
        axes.add_patch(
            Rectangle((column + start, row + 0.22), visible, 0.56, facecolor=ACCENT, alpha=tone, linewidth=0)
        )
        start += part
