"""The allocation as a picture: one cell per module, darker where more of the budget went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from guilomo.allocation.plan import Allocation, ModulePlan
from guilomo.errors import unknown
from guilomo.report.canvas import HALF, PIXELS_PER_INCH, canvas, panel, plain, points, words
from guilomo.report.grid import Grid, grid_of
from guilomo.report.palette import ACCENT, INK, LIGHT, LINE, MUTED, QUIET, house_style
from guilomo.report.units import compact

TITLES = {
    "experts": "Experts per module",
    "rank": "Total rank per module",
    "parameters": "Trainable parameters per module",
}
_TALL, _SHORT = 36, 20
#: Models with more layers get short rows, which have no room for a second line.
DETAILED_ROWS = 16
_LEFT, _HEADING_LINE, _TOP = 30, 13, 30


@dataclass(frozen=True)
class Cell:
    """What one module shows: the value behind its shade, the main line, a second line if it fits."""

    value: float
    text: str
    detail: str = ""


def cells_of(allocation: Allocation, what: str) -> dict[str, Cell]:
    """The cell of every module for one quantity."""
    if what not in TITLES:
        raise unknown("what", what, TITLES)
    rows = {row["module"]: row for row in allocation.rows()}
    cells = {}
    for name, plan in allocation.modules.items():
        if what == "experts":
            cells[name] = Cell(plan.experts, str(plan.experts))
        elif what == "rank":
            cells[name] = Cell(plan.rank, str(plan.rank), rank_detail(plan))
        else:
            cells[name] = Cell(rows[name]["parameters"], compact(rows[name]["parameters"]))
    return cells


def rank_detail(plan: ModulePlan) -> str:
    """How the total rank is divided: `3×4` for equal experts, `4+4+2` or `5×2–8` for mixed ranks."""
    if len(set(plan.ranks)) <= 1:
        return f"{plan.experts}×{plan.ranks[0]}" if plan.ranks else ""
    if plan.experts <= 3:
        return "+".join(map(str, sorted(plan.ranks, reverse=True)))
    return f"{plan.experts}×{min(plan.ranks)}\N{EN DASH}{max(plan.ranks)}"


@house_style
def plot_allocation(
    allocation: Allocation, what: str = "experts", ax: Axes | None = None, width: float = HALF
) -> Figure:
    """A heat map of the plan, layer by projection, with the values written in the cells.

    Args:
        allocation: the plan.
        what: `experts`, `rank` (total rank, and below it how it is divided) or `parameters`.
        ax: axes to draw into; their size decides how much text fits. Default: a figure of its own.
        width: width of that figure in pixels.
    """
    cells, grid = cells_of(allocation, what), grid_of(allocation.modules)
    if ax is not None:
        draw_cells(ax, grid, cells)
        return ax.get_figure(root=True) or Figure()
    headings = grid.headings((width - _LEFT) / max(len(grid.columns), 1))
    top = _TOP + _HEADING_LINE * (1 + max((name.count("\n") for name in headings), default=0)) + 6
    height = len(grid.rows) * (_TALL if len(grid.rows) <= DETAILED_ROWS else _SHORT)
    figure = canvas(width, top + height + 2)
    words(figure, 0, 14, TITLES[what], 13, weight="bold")
    draw_cells(panel(figure, _LEFT, top, width - _LEFT, height), grid, cells)
    return figure


def draw_cells(axes: Axes, grid: Grid, cells: dict[str, Cell], top: float | None = None) -> None:
    """Draws the cells of a grid with row and column names into axes of any size.

    Args:
        axes: where to draw.
        grid: the place of every module.
        cells: module name -> what it shows.
        top: the value of the darkest shade; default: the largest value.
    """
    width, height = _start(axes, grid)
    top = top or max((cell.value for cell in cells.values()), default=0) or 1
    for name, (row, column) in grid.places.items():
        cell = cells[name]
        if cell.value == 0:
            _empty(axes, row, column, width, height)
            continue
        share = cell.value / top
        axes.add_patch(_box(row, column, width, height, facecolor=ACCENT, alpha=0.07 + 0.87 * share))
        _write(axes, (row, column), cell, (width, height), _ink(share))
    _name_sides(axes, grid, width, height)


def _start(axes: Axes, grid: Grid) -> tuple[float, float]:
    """Prepares the axes; returns the size of a cell in pixels."""
    plain(axes)
    axes.set_xlim(0, max(len(grid.columns), 1))
    axes.set_ylim(max(len(grid.rows), 1), 0)
    figure = axes.get_figure(root=True)
    box = axes.get_position()
    inches = figure.get_size_inches() if figure else (1.0, 1.0)
    width, height = box.width * inches[0] * PIXELS_PER_INCH, box.height * inches[1] * PIXELS_PER_INCH
    return width / max(len(grid.columns), 1), height / max(len(grid.rows), 1)


def _box(row: int, column: int, width: float, height: float, **style: Any) -> Rectangle:
    """A cell with a gap of two pixels to its neighbours."""
    x, y = 1 / width, 1 / height
    return Rectangle((column + x, row + y), 1 - 2 * x, 1 - 2 * y, linewidth=0, **style)


def _empty(axes: Axes, row: int, column: int, width: float, height: float) -> None:
    """A module that is not adapted: hatched, so that it is not mistaken for a small value."""
    patch = _box(row, column, width, height, facecolor="none", hatch="////", edgecolor=LINE)
    axes.add_patch(patch)


def _ink(share: float) -> str:
    """Text that stays readable on a cell of this shade in the light and in the dark scheme."""
    return INK if share < 0.57 else LIGHT["on-middle"] if share < 0.74 else LIGHT["on-accent"]


def _write(axes: Axes, place: tuple[int, int], cell: Cell, size: tuple[float, float], colour: str) -> None:
    """The value, and its division below it (in tall cells) or behind it (in wide ones)."""
    row, column = place
    width, height = size
    if width < 18 or height < 13:
        return
    style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": colour}
    middle, text = row + 0.53, cell.text
    if cell.detail and height >= 30:
        middle = row + 0.36
        axes.text(column + 0.5, row + 0.75, cell.detail, fontsize=points(10), **style)
    elif cell.detail and width >= 44:
        text = f"{cell.text} = {cell.detail}" if width >= 84 else text
    axes.text(column + 0.5, middle, text, fontsize=points(12), **style)


def _name_sides(axes: Axes, grid: Grid, width: float, height: float) -> None:
    """Projection names above the columns and layer numbers left of the rows, thinned where they collide."""
    across = axes.get_xaxis_transform()
    size = points(11 if width >= 44 else 10)
    for column, name in enumerate(grid.headings(width)):
        x = column + 0.5
        axes.annotate(name, (x, 1), (0, 4), across, "offset points", size=size, color=MUTED, **_above())
    step = max(1, round(13 / height + 0.49))
    for row, name in list(enumerate(grid.rows))[::step]:
        axes.text(-6 / width, row + 0.5, name, fontsize=points(11), color=QUIET, ha="right", va="center")
    corner = (-6 / width, 1)
    axes.annotate("layer", corner, (0, 4), across, "offset points", size=points(10), color=QUIET, **_above("right"))


def _above(side: str = "center") -> dict[str, Any]:
    return {"ha": side, "va": "bottom"}


@house_style
def plot_small_allocations(plans: Sequence[tuple[str, Allocation]], width: float = 920) -> Figure:
    """Several plans as small heat maps of total rank, all on one scale, without numbers.

    Args:
        plans: (label, plan) pairs.
        width: width of the figure in pixels; the maps flow into as many columns as fit.
    """
    across = max(1, min(len(plans), int(width // 165)))
    each, rows = width / across, [plans[i : i + across] for i in range(0, len(plans), across)]
    depth = max((len(grid_of(plan.modules).rows) for _, plan in plans), default=1)
    tall = depth * (13 if depth <= 12 else 7) + 40
    figure = canvas(width, max(tall * len(rows), 1))
    top = max((module.rank for _, plan in plans for module in plan.modules.values()), default=1)
    for line, entries in enumerate(rows):
        for place, (label, plan) in enumerate(entries):
            words(figure, place * each, line * tall + 14, label, 12)
            axes = panel(figure, place * each, line * tall + 22, each - 18, tall - 40)
            _draw_small(axes, plan, top)
    return figure


def _draw_small(axes: Axes, plan: Allocation, top: int) -> None:
    """Shades only: the numbers of every plan are in its allocation file."""
    grid = grid_of(plan.modules)
    width, height = _start(axes, grid)
    for name, (row, column) in grid.places.items():
        rank = plan.modules[name].rank
        if rank == 0:
            _empty(axes, row, column, width, height)
        else:
            axes.add_patch(_box(row, column, width, height, facecolor=ACCENT, alpha=0.07 + 0.87 * rank / top))
