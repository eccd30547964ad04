"""The losses of the search and of the training, and the budget the search had to keep."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from guilomo.report.canvas import PHONE, WIDE, canvas, panel, points, quiet, size, words
from guilomo.report.curves import Curve, binned, clean, mean_curve, picked, spread
from guilomo.report.palette import ACCENT, INK, MUTED, QUIET, house_style
from guilomo.report.reading import Results, label_of, lead_of, methods_of, part, runs_of
from guilomo.report.units import compact, number

_HEIGHT, _TOP, _GAP, _LEFT, _KEY = 190, 30, 34, 36, 17
_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 2), (1.2, 1.6), (6, 2, 1.2, 2), (8, 3), (2, 3))

KeyLine = tuple[str, str, int]
#: A line of the key under a panel: its text, its colour, and which of the dashes.
Panel = tuple[str, Callable[[Axes], list[KeyLine]]]


@house_style
def plot_losses(results: Results, width: float = WIDE) -> Figure:
    """Search losses, expected size during the search, and training losses, as far as they were recorded.

    Args:
        results: the parsed results.json.
        width: width of the figure in pixels; narrow pictures stack the panels.
    """
    panels = _panels(results)
    if not panels:
        figure = canvas(width, 40)
        words(figure, 0, 24, "No losses were recorded.", 12, color=MUTED)
        return figure
    stacked = width < PHONE
    keys = max(len(methods_of(results)), 2) * _KEY
    block = _TOP + _HEIGHT + 34 + keys
    each = width if stacked else (width + _GAP) / len(panels)
    figure = canvas(width, block * (len(panels) if stacked else 1))
    for place, (title, draw) in enumerate(panels):
        x, y = (0.0, place * block) if stacked else (place * each, 0.0)
        words(figure, x, y + 14, title, 13, weight="bold")
        room = each - _LEFT - (14 if stacked else _GAP + 14)
        axes = quiet(panel(figure, x + _LEFT, y + _TOP, room, _HEIGHT))
        _write_key(figure, draw(axes), x, y + _TOP + _HEIGHT + 38)
    return figure


def _panels(results: Results) -> list[Panel]:
    """The panels there is something to draw in."""
    trajectory = part(results, "search", "trajectory")
    panels: list[Panel] = []
    if trajectory.get("train_loss") or trajectory.get("held_out_loss"):
        panels.append(("Loss during the search", lambda axes: _draw_search(axes, results)))
    if trajectory.get("expected_parameters"):
        panels.append(("Expected parameters", lambda axes: _draw_size(axes, results)))
    if any(run.get("loss_curve") for method in methods_of(results) for run in runs_of(method)):
        panels.append(("Training loss", lambda axes: _draw_training(axes, results)))
    return panels


def _recorded(results: Results, name: str) -> Curve:
    trajectory = part(results, "search", "trajectory")
    values = trajectory.get(name) or []
    return clean(trajectory.get("step") or range(len(values)), values)


def _draw_search(axes: Axes, results: Results) -> list[KeyLine]:
    """What the weights are fitted to, and what the selection vectors are fitted to."""
    key = []
    for name, label, colour in (
        ("train_loss", "training split (inner problem)", QUIET),
        ("held_out_loss", "held-out split (outer problem)", ACCENT),
    ):
        steps, values = binned(_recorded(results, name))
        if steps:
            axes.plot(steps, values, color=colour, linewidth=1.5)
            key.append((label, colour, 0))
    return key


def _draw_size(axes: Axes, results: Results) -> list[KeyLine]:
    """The size the selection vectors stand for, against the budget."""
    axes.plot(*picked(_recorded(results, "expected_parameters")), color=ACCENT, linewidth=1.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    key = [("expected under the selection vectors", ACCENT, 0)]
    budget = number(part(results, "budget").get("parameters"))
    if budget is not None:
        axes.axhline(budget, color=INK, linewidth=1.0, dashes=_DASHES[1])
        key.append((f"budget, {compact(budget)}", INK, 1))
    return key


def _draw_training(axes: Axes, results: Results) -> list[KeyLine]:
    """The mean over seeds of every method; the method of the page in the accent colour, on top."""
    lead, key, dash = lead_of(results), [], 0
    for method in methods_of(results):
        curves = [run["loss_curve"] for run in runs_of(method) if run.get("loss_curve")]
        if not curves:
            continue
        leads = method is lead
        steps, values = binned(mean_curve(curves), 40)
        colour, style = (ACCENT, 0) if leads else (QUIET, dash % len(_DASHES))
        dash += not leads
        wide, order = (2.0, 3) if leads else (1.2, 2)
        axes.plot(steps, values, color=colour, linewidth=wide, dashes=_DASHES[style] or (None, None), zorder=order)
        key.append((label_of(method), colour, style))
    return key


def _write_key(figure: Figure, key: list[KeyLine], x: float, y: float) -> None:
    """A short stroke and a name per line, under the panel where they cover no data."""
    heights = spread([y + i * _KEY for i in range(len(key))], _KEY)
    total_width, total_height = size(figure)
    for (label, colour, dash), height in zip(key, heights, strict=True):
        axes = panel(figure, x, height - 8, 24, 8)
        axes.set_axis_off()
        axes.plot((0, 1), (0.5, 0.5), color=colour, linewidth=1.6, dashes=_DASHES[dash] or (None, None))
        axes.set_xlim(0, 1)
        place = (x + 32) / total_width, 1 - height / total_height
        figure.text(*place, label, fontsize=points(11), color=MUTED if colour != ACCENT else ACCENT)
