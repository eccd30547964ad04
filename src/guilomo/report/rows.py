"""The rows of the page's tables, as finished text: the template places them and computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from guilomo.report.reading import (
    Method,
    Results,
    estimate_of,
    label_of,
    lead_of,
    methods_of,
    metrics_of,
    on_part,
    part,
    part_names,
    primary_of,
    step_seconds,
)
from guilomo.report.router import health_of
from guilomo.report.units import (
    DASH,
    THIN,
    compact,
    count,
    duration,
    lower_is_better,
    number,
    p_value,
    plain,
    share,
    title_of,
    unit_of,
)

Row = dict[str, Any]


def plain_lora(results: Results) -> Method | None:
    """The method that step times are compared with."""
    return next((method for method in methods_of(results) if method.get("name") == "lora"), None)


def step_ratio(results: Results, method: Method) -> float | None:
    """Step time as a multiple of plain LoRA's in the same run."""
    base = plain_lora(results)
    own, reference = step_seconds(method), step_seconds(base) if base else None
    return own / reference if own is not None and reference else None


def interval_text(method: Method, metric: str) -> tuple[str, str]:
    """The mean of a metric and its interval, as text; an empty interval if there is none."""
    found, unit = estimate_of(method, metric), unit_of(metric)
    if found is None:
        return DASH, ""
    bounds = found.bounds
    return unit.show(found.mean), f"[{unit.bare(bounds[0])}, {unit.bare(bounds[1])}]" if bounds else ""


def comparison_rows(results: Results) -> list[Row]:
    """One row per method: every metric with its interval, then what the method costs."""
    lead = lead_of(results)
    return [
        {
            "label": label_of(method),
            "kind": method.get("kind") or "",
            "lead": method is lead,
            "metrics": [(title_of(name), *interval_text(method, name)) for name in metrics_of(results)],
            "parameters": count(method.get("parameters")),
            "active": count(method.get("active_parameters")),
            "flops": compact(method.get("flops_per_token")),
            "rate": rate_text(method),
            "edge": bool(part(method, "sweep").get("edge")),
            "step": _times(step_ratio(results, method)),
            "step_ms": _milliseconds(step_seconds(method)),
        }
        for method in methods_of(results)
    ]


def part_rows(results: Results) -> list[Row]:
    """One row per method of a mixed task: its scores on every part; nothing of a single task."""
    names, lead = part_names(results), lead_of(results)
    measured = {name for method in methods_of(results) for part_ in names for name in part(method, "parts", part_)}
    # What was asked for first: it may have been measured on some parts only.
    wanted = (results.get("primary_metric"), primary_of(results), "loss")
    shown = list(dict.fromkeys(str(name) for name in wanted if name in measured))
    return [
        {
            "label": label_of(method),
            "lead": method is lead,
            "cells": [
                (f"{name}: {title_of(metric)}", *interval_text(on_part(method, name), metric))
                for name in names
                for metric in shown
            ],
        }
        for method in methods_of(results)
        if names
    ]


def rate_text(method: Method) -> str:
    """The learning rate that the sweep chose; empty without a sweep."""
    chosen = number(part(method, "sweep").get("chosen"))
    return "" if chosen is None else f"{chosen:g}"


def _times(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}×"


def _milliseconds(seconds: float | None) -> str:
    return DASH if seconds is None else f"{seconds * 1000:.0f}{THIN}ms"


def test_rows(results: Results) -> list[Row]:
    """One row per paired test, with a plain word for what the corrected p-value allows to say."""
    names = {method.get("name"): label_of(method) for method in methods_of(results)}
    rows = []
    for test in results.get("tests") or []:
        metric = str(test.get("metric") or "")
        unit = unit_of(metric)
        low, high = number(test.get("low")), number(test.get("high"))
        rows.append(
            {
                "pair": " against ".join(str(names.get(test.get(side), test.get(side))) for side in "ab"),
                "metric": title_of(metric),
                "difference": unit.difference(number(test.get("difference"))),
                "interval": "" if low is None or high is None else f"[{unit.bare(low)}, {unit.bare(high)}]",
                "p": p_value(test.get("p")),
                "p_corrected": p_value(test.get("p_corrected")),
                "says": _reading(test, metric),
                "test": test.get("test") or DASH,
            }
        )
    return rows


def _reading(test: Mapping[str, Any], metric: str) -> str:
    """What a reader may conclude at the 5 % level; the corrected p-value decides where there is one."""
    p = number(test.get("p_corrected"))
    p = number(test.get("p")) if p is None else p
    difference = number(test.get("difference"))
    if p is None or difference is None:
        return DASH
    if p >= 0.05:
        return "no difference shown"
    return "better" if (difference < 0) == lower_is_better(metric) else "worse"


def router_rows(results: Results) -> list[Row]:
    """One row per method with routers: how evenly the experts are used, and the dead ones."""
    found = [(method, health_of(method)) for method in methods_of(results)]
    return [
        {
            "label": label_of(method),
            "lead": method is lead_of(results),
            "entropy": plain(health.entropy),
            "least": plain(health.least),
            "largest": share(health.largest),
            "dead": f"{health.dead:g}",
            "alarm": health.dead > 0,
            "modules": _listed(health.modules),
        }
        for method, health in found
        if health
    ]


def _listed(names: Sequence[str], limit: int = 8) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def cost_rows(results: Results) -> list[Row]:
    """The stages of the run with their time and their share of the total."""
    seconds = part(results, "seconds")
    total = number(seconds.get("total"))
    stages = [(name, number(seconds.get(name))) for name in seconds if name != "total"]
    known = [(name, value) for name, value in stages if value is not None]
    whole = max(total or 0.0, sum(value for _, value in known))
    rest = whole - sum(value for _, value in known)
    if known and rest > 0.01 * whole:
        known.append(("evaluation and the rest", rest))
    return [
        {"name": name, "time": duration(value), "share": round(100 * value / whole, 2) if whole else 0.0}
        for name, value in known
    ]
