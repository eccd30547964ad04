"""One wide picture of a run for a README or a slide: where the parameters went, and what that brought."""

from __future__ import annotations

from matplotlib.figure import Figure

from guilomo.report.canvas import canvas, panel, words
from guilomo.report.comparison import LABELS, VALUES, Entry, draw_entries, entries_of
from guilomo.report.grid import grid_of
from guilomo.report.heatmap import cells_of, draw_cells
from guilomo.report.palette import MUTED, house_style
from guilomo.report.reading import Results, allocation_of, label_of, lead_of, part, primary_of, same_size
from guilomo.report.units import count, title_of

_WIDTH, _TOP, _MAP, _GAP = 1280.0, 106.0, 470.0, 60.0


@house_style
def plot_headline(results: Results) -> Figure:
    """The allocation as a heat map on the left, the methods at equal budget on the right.

    Args:
        results: the parsed results.json; either half stays empty, and says so, if the run has no such part.
    """
    plan = allocation_of(lead_of(results))
    metric = primary_of(results)
    rows = len(grid_of(plan.modules).rows) if plan else 6
    entries = entries_of(results, metric) if metric else []
    height = max(rows * (38 if rows <= 12 else 20), len(entries) * 44 + 36, 200)
    figure = canvas(_WIDTH, _TOP + height + 28)
    _draw_plan(figure, results, height)
    _draw_methods(figure, results, entries, height)
    return figure


def _draw_methods(figure: Figure, results: Results, entries: list[Entry], height: float) -> None:
    """The right half; it calls the budget equal only where it is."""
    x, metric = 28 + _MAP + _GAP, primary_of(results)
    budget = part(results, "budget").get("parameters")
    equal = " at equal budget" if same_size(results) else ""
    heading = f"{title_of(metric)}{equal}" if metric else "Nothing has been measured yet"
    words(figure, x, 34, heading, 17, weight="bold")
    if budget is not None:
        words(
            figure,
            x,
            56,
            f"budget {count(budget)} trainable parameters; rings: single seeds",
            12.5,
            color=MUTED,
        )
    if entries:
        axes = panel(figure, x + LABELS, _TOP - 20, _WIDTH - x - LABELS - VALUES - 28, height - 16)
        draw_entries(axes, entries, metric or "", stacked=False)


def _draw_plan(figure: Figure, results: Results, height: float) -> None:
    """The left half: total rank per module, and below it how it is divided among the experts."""
    lead = lead_of(results)
    plan = allocation_of(lead)
    if lead is None or plan is None:
        words(figure, 28, 34, "No allocation yet", 17, weight="bold")
        return
    words(figure, 28, 34, f"{label_of(lead)}: rank per module", 17, weight="bold")
    words(figure, 28, 56, "total rank; below it experts × rank of each", 12.5, color=MUTED)
    axes = panel(figure, 28 + 30, _TOP + 8, _MAP - 30, height)
    draw_cells(axes, grid_of(plan.modules), cells_of(plan, "rank"))
