"""The comparison as CSV, for a spreadsheet or a data frame: every number as it is in compare.json."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from guilomo.report.family.against import Against, against, metrics_tested
from guilomo.report.family.reading import Comparison, Task, result_of, tasks_of
from guilomo.report.reading import Method, label_of, methods_of, part


def cells_csv(compare: Comparison) -> str:
    """One row per method, task and seed; a column `metric:NAME` for every further metric. Empty means not measured."""
    rows = []
    for method in methods_of(compare):
        for task in tasks_of(compare):
            rows += [_cell(method, task, cell) for cell in result_of(compare, method, task).cells]
    return _csv(rows)


def _cell(method: Method, task: Task, cell: Mapping[str, Any]) -> dict[str, Any]:
    entry = part(method, "tasks", task.name)
    return {
        "method": method.get("name"),
        "label": label_of(method),
        "kind": method.get("kind"),
        "maturity": method.get("maturity"),
        "task": task.name,
        "metric": task.metric,
        "seed": cell.get("seed"),
        "status": cell.get("status"),
        "value": cell.get("value"),
        "learning_rate": entry.get("learning_rate"),
        "parameters": entry.get("parameters"),
        "active_parameters": entry.get("active_parameters"),
        "train_seconds": cell.get("train_seconds"),
        "folder": cell.get("folder"),
        "error": cell.get("error"),
        **{f"metric:{name}": value for name, value in part(cell, "metrics").items()},
    }


def methods_csv(compare: Comparison) -> str:
    """One row per method; the columns of a task start with its name."""
    return _csv([_method(compare, method) for method in methods_of(compare)])


def _method(compare: Comparison, method: Method) -> dict[str, Any]:
    names = ("name", "label", "summary", "paper", "maturity", "kind", "mean_rank")
    row = {name: method.get(name) for name in names} | {"label": label_of(method)}
    for task in tasks_of(compare):
        row |= {f"{task.name}:{name}": value for name, value in _on_task(compare, method, task).items()}
    return row


def _on_task(compare: Comparison, method: Method, task: Task) -> dict[str, Any]:
    """What is known of a method on a task, in the words of compare.json."""
    entry = part(method, "tasks", task.name)
    result = result_of(compare, method, task)
    step = part(entry, "step_time_ratio")
    plain = ("mean", "low", "high", "rank", "learning_rate", "parameters", "active_parameters", "peak_bytes_ratio")
    return {
        **{name: entry.get(name) for name in plain},
        **{f"step_time_ratio_{name}": step.get(name) for name in ("median", "low", "high")},
        **{
            f"{metric}:{name}": value
            for metric in metrics_tested(compare, task)
            for name, value in _test(against(compare, method, task, metric)).items()
        },
        **{f"{name}:{key}": value for name, found in part(entry, "parts").items() for key, value in found.items()},
        "done": result.done,
        "failed": result.failed,
        "missing": result.missing,
    }


def _test(test: Against | None) -> dict[str, Any]:
    """What a test against the reference found."""
    return {
        "difference": test and test.difference,
        "low": test and test.low,
        "high": test and test.high,
        "p": test and test.p,
        "p_corrected": test and test.corrected,
    }


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows under the union of their columns; nothing for None."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
