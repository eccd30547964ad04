"""The rows of the page's tables, as finished text: the template places them and computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from guilomo.report.facts import plural
from guilomo.report.family.against import Against, against, metrics_tested
from guilomo.report.family.plans import routed
from guilomo.report.family.reading import (
    Comparison,
    Result,
    Task,
    is_reference,
    ordered_methods,
    result_of,
    tasks_of,
)
from guilomo.report.reading import Method, label_of, part
from guilomo.report.router import health_of
from guilomo.report.units import DASH, Unit, count, number, p_value, plain, share, title_of, unit_of

Row = dict[str, Any]
SAYINGS = {"better": "better", "worse": "worse", "even": "not told apart"}


def method_rows(compare: Comparison) -> list[Row]:
    """One row per method: what it is, how it did on every task, its mean rank, what it costs."""
    return [_method_row(compare, method) for method in ordered_methods(compare)]


def _method_row(compare: Comparison, method: Method) -> Row:
    results = [result_of(compare, method, task) for task in tasks_of(compare)]
    return {
        "label": label_of(method),
        "summary": method.get("summary") or "",
        "paper": method.get("paper") or "",
        "maturity": method.get("maturity") or "",
        "kind": "" if method.get("kind") == "method" else method.get("kind") or "",
        "reference": is_reference(compare, method),
        "cells": [cell_of(compare, method, task) for task in tasks_of(compare)],
        "rank": plain(method.get("mean_rank")),
        "parameters": span_text((result.parameters for result in results), count),
        "active": span_text((result.active for result in results), count),
        "step": span_text((result.step.middle if result.step else None for result in results), plain, "×"),
        "memory": span_text((result.memory for result in results), plain, "×"),
    }


def cell_of(compare: Comparison, method: Method, task: Task) -> Row:
    """One method on one task: mean, interval, difference to the reference, and what is not done."""
    result, test = result_of(compare, method, task), against(compare, method, task)
    return {
        "task": task.name,
        "counted": task.counted,
        "value": task.unit.show(result.mean),
        "interval": interval_text(result.low, result.high, task.unit),
        "difference": _difference(test, task) if test else "",
        "p": f"p {p_value(test.corrected)}" if test and test.corrected is not None else "",
        "outcome": test.outcome if test else "",
        "further": [
            {"difference": _difference(other, task), "outcome": other.outcome}
            for metric in metrics_tested(compare, task)[1:]
            if (other := against(compare, method, task, metric))
        ],
        "alarm": _share_of(result.failed, result, "failed"),
        "missing": _share_of(result.missing, result, "missing"),
        "reference": is_reference(compare, method) and result.mean is not None,
    }


def mixtures(compare: Comparison) -> list[Row]:
    """Of every mixed task, one row per method with its scores on the parts."""
    found = []
    for task in tasks_of(compare):
        if names := list(task.source.get("parts") or []):
            scores = [(label_of(m), part(m, "tasks", task.name, "parts")) for m in ordered_methods(compare)]
            rows = [{"label": label, "cells": [_on_part(own, name) for name in names]} for label, own in scores]
            found.append({"task": task.name, "parts": names, "rows": rows})
    return found


def _on_part(scores: Mapping[str, Any], name: str) -> Row:
    own = part(scores, name)
    unit = unit_of(str(own.get("metric") or ""))
    interval = interval_text(number(own.get("low")), number(own.get("high")), unit)
    return {"part": name, "value": unit.show(number(own.get("mean"))), "interval": interval}


def _difference(test: Against, task: Task) -> str:
    """The difference, with its metric where that is not the task's own."""
    name = "" if test.metric == task.metric else title_of(test.metric).lower() + " "
    return name + test.unit.difference(test.difference)


def _share_of(amount: int, result: Result, word: str) -> str:
    """`failed` for all seeds, `1 of 3 seeds failed` for some, nothing for none."""
    if not amount:
        return ""
    whole = len(result.cells)
    return word if amount == whole else f"{amount} of {plural(whole, 'seed')} {word}"


def span_text(values: Iterable[float | None], show: Callable[[float], str], unit: str = "") -> str:
    """The value of all tasks, or the smallest and the largest where they differ: `1.31–1.44×`."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return DASH
    ends = dict.fromkeys([show(known[0]), show(known[-1])])
    return DASH.join(ends) + unit


def router_rows(compare: Comparison) -> list[Row]:
    """One row per method with routers: how evenly the experts are used over all tasks, and the dead ones."""
    found = [(method, health_of(method)) for method in routed(compare)]
    return [
        {
            "label": label_of(method),
            "entropy": plain(health.entropy),
            "least": plain(health.least),
            "largest": share(health.largest),
            "dead": plain(health.dead, 0 if health.dead == round(health.dead) else 1),
            "alarm": health.dead > 0,
        }
        for method, health in found
        if health
    ]


def test_rows(compare: Comparison) -> list[Row]:
    """One row per test, in the order of the tasks and of the methods."""
    return [
        {
            "task": task.name,
            "method": label_of(method),
            "metric": title_of(test.metric),
            "difference": test.unit.difference(test.difference),
            "interval": interval_text(test.low, test.high, test.unit),
            "p": p_value(test.p),
            "corrected": p_value(test.corrected),
            "says": SAYINGS.get(test.outcome, DASH),
            "outcome": test.outcome,
            "test": test.test,
        }
        for task in tasks_of(compare)
        for metric in metrics_tested(compare, task)
        for method in ordered_methods(compare)
        if (test := against(compare, method, task, metric))
    ]


def interval_text(low: float | None, high: float | None, unit: Unit) -> str:
    """`[80.1, 83.4]`, or nothing if an end is unknown."""
    return "" if low is None or high is None else f"[{unit.bare(low)}, {unit.bare(high)}]"


def failure_rows(compare: Comparison) -> list[Row]:
    """What failed, where, and what it said."""
    names = {method.get("name"): label_of(method) for method in ordered_methods(compare)}
    return [
        {
            "method": names.get(entry.get("method"), entry.get("method")) or DASH,
            "task": entry.get("task") or DASH,
            "seed": DASH if entry.get("seed") is None else entry["seed"],
            "error": entry.get("error") or "no message",
        }
        for entry in compare.get("failures") or []
    ]


def task_rows(compare: Comparison) -> list[Row]:
    """What the tasks are: data, chance, budget."""
    rows = []
    for task in tasks_of(compare):
        sizes = task.source.get("sizes") or {}
        chance = task.source.get("chance")
        rows.append(
            {
                "name": task.name,
                "kind": task.source.get("kind") or "",
                "metric": title_of(task.metric),
                "sizes": " / ".join(count(sizes.get(split)) for split in ("train", "held_out", "test")),
                "chance": DASH if chance is None else task.unit.show(chance),
                "budget": count(task.source.get("budget")),
                "hash": task.source.get("hash") or "not recorded",
                "note": task.note,
                "counted": task.counted,
            }
        )
    return rows
