"""The pictures of the page of a comparison, as far as there is material for them."""

from __future__ import annotations

from matplotlib.figure import Figure

from guilomo.report.family.against import metrics_tested
from guilomo.report.family.costs import COSTS, marks_of, plot_costs
from guilomo.report.family.differences import plot_differences
from guilomo.report.family.plans import loads_of, plans_of
from guilomo.report.family.ranks import plot_ranks, ranked
from guilomo.report.family.reading import Comparison, ordered_methods, reference_label, tasks_of
from guilomo.report.family.sweeps import plot_sweeps, sweep_of
from guilomo.report.heatmap import plot_small_allocations
from guilomo.report.pictures import Picture, picture
from guilomo.report.reading import Method, label_of
from guilomo.report.router import plot_router_load
from guilomo.report.units import title_of


def pictures_of(compare: Comparison) -> dict[str, Picture]:
    """Every picture there is material for, by name; the template says what is missing."""
    return _differences(compare) | _costs(compare) | _ranks(compare) | _plans(compare) | _sweeps(compare)


def _differences(compare: Comparison) -> dict[str, Picture]:
    if not compare.get("tests") or not tasks_of(compare):
        return {}
    text = f"Difference of every method to {reference_label(compare)} with its interval, one panel per task."
    return {"differences": picture("differences", text, lambda width: plot_differences(compare, None, width))}


def further_differences(compare: Comparison) -> list[tuple[str, Picture]]:
    """The differences in what else was tested: the metrics that stand for no task's own."""
    metrics = [metrics_tested(compare, task) for task in tasks_of(compare)]
    first = {found[0] for found in metrics}
    found = []
    for place, metric in enumerate(dict.fromkeys(m for ms in metrics for m in ms if m not in first)):
        text = f"Difference of every method to {reference_label(compare)} in {title_of(metric).lower()}."

        def draw(width: float, metric: str = metric) -> Figure:
            return plot_differences(compare, metric, width)

        found.append((title_of(metric), picture(f"further-{place}", text, draw)))
    return found


def _costs(compare: Comparison) -> dict[str, Picture]:
    found = {}
    for what, cost in COSTS.items():
        if not any(marks_of(compare, task, what) for task in tasks_of(compare)):
            continue
        text = f"Quality of every method against its {cost.title[:1].lower()}{cost.title[1:]}, one panel per task."

        def draw(width: float, what: str = what) -> Figure:
            return plot_costs(compare, what, width)

        found[what] = picture(what, text, draw)
    return found


def _ranks(compare: Comparison) -> dict[str, Picture]:
    entries = ranked(compare)
    if len(entries) < 2:
        return {}
    order = ", ".join(label_of(method) for method, _ in entries)
    text = f"Mean ranks of the methods, best first: {order}."
    return {"ranks": picture("ranks", text, lambda width: plot_ranks(compare, width))}


def _plans(compare: Comparison) -> dict[str, Picture]:
    plans = [(plan.label, plan.allocation) for plan in plans_of(compare)]
    if not plans:
        return {}
    text = "Total rank per module of every plan, on one scale: " + ", ".join(label for label, _ in plans)
    return {"plans": picture("plans", text, lambda width: plot_small_allocations(plans, width))}


def _sweeps(compare: Comparison) -> dict[str, Picture]:
    swept = any(sweep_of(method, task) for method in ordered_methods(compare) for task in tasks_of(compare))
    text = "Held-out loss of every method at every learning rate, the chosen ones filled, one panel per task."
    return {"sweeps": picture("sweeps", text, lambda width: plot_sweeps(compare, width))} if swept else {}


def router_pictures(compare: Comparison) -> list[tuple[str, Picture]]:
    """The router load of every method that has routers, on the first task on which any were recorded."""
    loads = loads_of(compare)
    found = []
    for place, method in enumerate(loads[1] if loads else []):
        label = label_of(method)
        text = f"Share of the tokens each expert of {label} received, one bar per module."

        def draw(width: float, method: Method = method) -> Figure:
            return plot_router_load([method], width)

        found.append((label, picture(f"router-{place}", text, draw)))
    return found
