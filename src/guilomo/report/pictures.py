"""The pictures of the page, each drawn twice: for a desktop column and for a phone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from guilomo.report.canvas import HALF, NARROW, WIDE
from guilomo.report.comparison import entries_of, plot_comparison
from guilomo.report.heatmap import TITLES, plot_allocation, plot_small_allocations
from guilomo.report.losses import plot_losses
from guilomo.report.reading import (
    Results,
    allocation_of,
    label_of,
    lead_of,
    methods_of,
    part,
    primary_of,
    router_of,
)
from guilomo.report.router import plot_router_load
from guilomo.report.svg import inline_svg
from guilomo.report.trajectories import QUANTITIES, plot_trajectories
from guilomo.report.units import title_of


@dataclass(frozen=True)
class Picture:
    """The two renderings of one picture as SVG."""

    wide: Markup
    narrow: Markup


def picture(name: str, description: str, draw: Callable[[float], Figure], wide: float = WIDE) -> Picture:
    """Draws both renderings; every id in them starts with `name`, which is unique in the page."""
    # The SVG is our own text with the description escaped, so it is safe to paste unescaped.
    return Picture(
        Markup(inline_svg(draw(wide), f"{name}-wide", description)),
        Markup(inline_svg(draw(NARROW), f"{name}-narrow", description)),
    )


def pictures_of(results: Results) -> dict[str, Picture]:
    """Every picture there is material for, by name; the template says what is missing."""
    return _comparison(results) | _allocations(results) | _search(results) | _routers(results)


def _comparison(results: Results) -> dict[str, Picture]:
    metric = primary_of(results)
    entries = entries_of(results, metric) if metric else []
    if metric is None or not entries:
        return {}
    best = ", ".join(entry.label for entry in entries)
    text = f"{title_of(metric)} of each method with its interval, best first: {best}."
    return {"comparison": picture("comparison", text, lambda width: plot_comparison(results, width=width))}


def _allocations(results: Results) -> dict[str, Picture]:
    found: dict[str, Picture] = {}
    lead = lead_of(results)
    plan = allocation_of(lead)
    if lead is None or plan is None:
        return found
    for what in ("experts", "rank"):
        text = f"{TITLES[what]} of {label_of(lead)}: a heat map, layer by projection."

        def draw(width: float, what: str = what) -> Figure:
            return plot_allocation(plan, what, width=width)

        found[what] = picture(what, text, draw, HALF)
    plans = [(label_of(m), p) for m in methods_of(results) if (p := allocation_of(m)) is not None]
    if len(plans) > 1:
        text = "Total rank per module of every method, on one scale: " + ", ".join(label for label, _ in plans)
        found["plans"] = picture("plans", text, lambda width: plot_small_allocations(plans, width))
    return found


def _search(results: Results) -> dict[str, Picture]:
    found: dict[str, Picture] = {}
    trajectory = part(results, "search", "trajectory")
    if any(trajectory.get(quantity) for quantity in QUANTITIES):
        text = "Expected expert count and rank of every module over the search, one panel per projection."
        search = part(results, "search")
        found["trajectories"] = picture("trajectories", text, lambda width: plot_trajectories(search, width))
    trained = any(run.get("loss_curve") for method in methods_of(results) for run in method.get("runs") or [])
    if trained or any(trajectory.get(name) for name in ("train_loss", "held_out_loss", "expected_parameters")):
        text = "Losses of the search and of the training over their steps."
        found["losses"] = picture("losses", text, lambda width: plot_losses(results, width))
    return found


def _routers(results: Results) -> dict[str, Picture]:
    lead = lead_of(results)
    if lead is None or not router_of(lead).get("load"):
        return {}
    text = f"Share of the tokens each expert of {label_of(lead)} received, one bar per module."
    return {"router": picture("router", text, lambda width: plot_router_load([lead], width))}
