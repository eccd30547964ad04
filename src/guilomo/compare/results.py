"""compare.json from whatever cells are done: scores with intervals, ranks, tests against plain LoRA, and a verdict."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import numpy as np

import guilomo
from guilomo.compare.cells import Board, Cell, State
from guilomo.compare.queue import without_password
from guilomo.compare.verdict import verdict
from guilomo.evaluation import holm
from guilomo.evaluation.ranks import above_share, friedman, ranks
from guilomo.methods import METHODS
from guilomo.report.units import lower_is_better
from guilomo.run import Run, environment
from guilomo.run.compare import KINDS, leading_metric, method_row, paired_test, row_values, tested
from guilomo.run.config import MethodConfig
from guilomo.run.files import read_json

SCHEMA = 1
ALPHA = 0.05
Rows = dict[str, dict[str, dict[str, Any]]]
"""Rows as `method_row` makes them, by task and method; only those that have a plan."""


def comparison_results(board: Board, command: str) -> dict[str, Any]:
    """The content of compare.json."""
    config = board.config
    found = rows_of(board)
    facts = {name: read_json(run.folder / "facts.json") for name, run in board.runs.items()}
    tasks = [_task(board, name, facts[name], list(found[name].values())) for name in board.runs]
    counted = [task["name"] for task in tasks if task["above_chance"] is not False]
    methods = [_method(board, method, found, tasks) for method in config.methods]
    _rank(methods, tasks, counted)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "guilomo": guilomo.__version__,
        "name": config.name,
        "command": without_password(command),
        "created": environment.now(),
        "status": "complete" if all(board.state(cell) is State.DONE for cell in board.cells) else "partial",
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "config": config.model_dump(mode="json"),
        "model": {
            "name": config.model.path,
            "parameters": next(iter(facts.values()))["model_parameters"],
        },
        "reference": config.reference.name,
        "seeds": config.seeds,
        "tasks": tasks,
        "methods": methods,
        "tests": _tests(config.reference.name, tasks, found),
        "friedman": _friedman(methods, tasks, counted),
        "failures": _failures(board),
    }
    return {**results, "verdict": verdict(results)}


def rows_of(board: Board) -> Rows:
    """What every method has on every task."""
    found: Rows = {}
    for task, config in board.runs.items():
        run = Run(config)
        rows = [method_row(run, method) for method in config.methods]
        found[task] = {row["name"]: row for row in rows if row is not None}
    return found


def _task(board: Board, name: str, facts: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    metric = board.runs[name].evaluation.metric or leading_metric(rows)
    above, note = _above_chance(facts["chance"], rows, metric, generated=board.runs[name].evaluation.generate)
    return {
        "name": name,
        "kind": facts["data"]["kind"],
        "hash": facts["data"]["hash"],
        "sizes": facts["data"]["sizes"],
        "metric": metric,
        "higher_is_better": not lower_is_better(metric),
        "chance": facts["chance"],
        "budget": facts["budget"],
        "above_chance": above,
        "chance_note": note,
        "parts": board.runs[name].task.part_names,
    }


def _above_chance(
    chance: float | None, rows: list[dict[str, Any]], metric: str, generated: bool
) -> tuple[bool | None, str]:
    """Whether the best row is right more often than chance is, and how that was decided.

    What is right is said by the likelihood per character where that is the task's metric. The best of several rows is
    looked at because it was the best, so the p-value is multiplied by their number.
    """
    name, by = (metric, ", by likelihood per character") if metric == "accuracy_per_character" else ("accuracy", "")
    scored = {row["label"]: row["summary"][name] for row in rows if name in row["summary"]}
    if chance is None or generated or not scored:
        return None, "Not tested: there is no accuracy to compare with chance."
    best = max(scored, key=lambda label: float(scored[label]["mean"]))
    n = scored[best]["n"]
    right = math.floor(scored[best]["mean"] * n + 1e-6)
    p = min(1.0, above_share(right, n, chance) * len(scored))
    note = (
        f"The best row, {best}, has {right} of {n} test rows right on average over its seeds{by}; chance has "
        f"{chance:.1%}. Exact one-sided binomial test, times {len(scored)} rows: p = {p:.2g}."
    )
    return p < ALPHA, note


def _method(board: Board, method: MethodConfig, found: Rows, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    known = METHODS[method.strategy]
    return {
        "name": method.name,
        "label": method.label,
        "summary": known.summary,
        "paper": known.paper,
        "maturity": known.maturity,
        "kind": KINDS.get(method.strategy, "method" if known.paper else "control"),
        "tasks": {t["name"]: _entry(board, method, t, found[t["name"]].get(method.name)) for t in tasks},
    }


def _entry(board: Board, method: MethodConfig, task: dict[str, Any], row: dict[str, Any] | None) -> dict[str, Any]:
    """One method on one task; numbers are None where it has no plan, or no training, yet."""
    runs = {run["seed"]: run for run in row["runs"]} if row else {}
    first = next(iter(runs.values()), None)
    score = (row["summary"] if row else {}).get(task["metric"], {})
    costs = _costs(board, task["name"]).get(method.name, {})
    return {
        "parameters": row and row["parameters"],
        "active_parameters": row and row["active_parameters"],
        "learning_rate": first and first["learning_rate"],
        "sweep": row and row["sweep"],
        "cells": [_cell(board, Cell(task["name"], method.name, s), runs.get(s), task) for s in board.config.seeds],
        "mean": score.get("mean"),
        "low": score.get("low"),
        "high": score.get("high"),
        "rank": None,
        "parts": {part: _on_part(found, task["metric"]) for part, found in (row["parts"] if row else {}).items()},
        "allocation": row and row["allocation"],
        "router": first and first["router"],
        "step_time_ratio": costs.get("step_time_ratio"),
        "peak_bytes_ratio": costs.get("peak_bytes_ratio"),
    }


def _on_part(summary: dict[str, Any], metric: str) -> dict[str, Any]:
    """The task's metric on a part of it, or the loss where that metric is not made of single rows."""
    name = metric if metric in summary else "loss"
    return {"metric": name, **{key: summary[name][key] for key in ("mean", "low", "high")}}


def _cell(board: Board, cell: Cell, run: dict[str, Any] | None, task: dict[str, Any]) -> dict[str, Any]:
    metrics = {name: score["value"] for name, score in run["metrics"].items()} if run else {}
    state = board.state(cell)
    failed = state in (State.FAILED, State.BLOCKED)
    return {
        "seed": cell.seed,
        "status": "done" if state is State.DONE else "failed" if failed else "missing",
        "error": board.reason(cell),
        "value": metrics.get(task["metric"]),
        "metrics": metrics,
        "train_seconds": run["train_seconds"] if run else None,
        "folder": str(board.folder(cell).relative_to(board.config.folder)),
    }


def _costs(board: Board, task: str) -> dict[str, Any]:
    path = board.runs[task].folder / "costs.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    return found


def _rank(methods: list[dict[str, Any]], tasks: list[dict[str, Any]], counted: list[str]) -> None:
    """Fills in the ranks of the rows whose seeds are all done, and their mean over the tasks that count."""
    for task in tasks:
        entries = [m["tasks"][task["name"]] for m in methods]
        ready = [e for e in entries if e["mean"] is not None and all(c["status"] == "done" for c in e["cells"])]
        for entry, rank in zip(ready, ranks([e["mean"] for e in ready], task["higher_is_better"]), strict=True):
            entry["rank"] = rank
    for method in methods:
        found = [method["tasks"][name]["rank"] for name in counted]
        # Mean ranks over different tasks could not be compared.
        method["mean_rank"] = mean(found) if found and None not in found else None


def _tests(reference: str, tasks: list[dict[str, Any]], found: Rows) -> list[dict[str, Any]]:
    """Every method against plain LoRA on every task, in what `tested` says; Holm over all of them."""
    tests = []
    for task in tasks:
        rows = found[task["name"]]
        plain = rows.get(reference)
        for name, row in rows.items():
            if plain is None or row is plain:
                continue
            own, other = _same_seeds(row, plain)
            for metric in tested(task["metric"], own) if own else ():
                if test := _test(row_values(own, metric), row_values(other, metric), metric):
                    tests.append({"task": task["name"], "method": name, "metric": metric, **test})
    for test, corrected in zip(tests, holm([test["p"] for test in tests]), strict=True):
        test["p_corrected"] = corrected
    return tests


def _same_seeds(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The per-row results of two methods for the seeds that both have."""
    rows = [{run["seed"]: rows for run, rows in zip(m["runs"], m["rows"], strict=True)} for m in (a, b)]
    seeds = [seed for seed in rows[0] if seed in rows[1]]
    return [rows[0][seed] for seed in seeds], [rows[1][seed] for seed in seeds]


def _test(own: Any, other: Any, metric: str) -> dict[str, Any] | None:
    """None where a training diverged."""
    if not (np.isfinite(own).all() and np.isfinite(other).all()):
        return None
    return paired_test(own, other, metric)


def _friedman(methods: list[dict[str, Any]], tasks: list[dict[str, Any]], counted: list[str]) -> dict[str, Any] | None:
    """Do methods differ over all tasks? From the methods that are done everywhere; None with fewer than three."""
    sides = {task["name"]: task["higher_is_better"] for task in tasks}
    whole = [m for m in methods if m["mean_rank"] is not None]
    blocks = []
    for name in counted:
        for cells in zip(*(m["tasks"][name]["cells"] for m in whole), strict=True):
            if all(cell["value"] is not None for cell in cells):
                blocks.append(ranks([cell["value"] for cell in cells], sides[name]))
    if len(whole) < 3 or len(blocks) < 2:
        return None
    found = friedman(blocks)
    return {
        "statistic": found.statistic,
        "p": found.p_value,
        "critical_difference": found.critical_difference,
        "alpha": ALPHA,
        "n_blocks": found.blocks,
        "blocks": "tasks x seeds",
        "mean_ranks": dict(zip([m["name"] for m in whole], found.mean_ranks, strict=True)),
    }


def _failures(board: Board) -> list[dict[str, Any]]:
    reasons = [(cell, board.reason(cell)) for cell in board.cells]
    return [
        {"task": cell.task, "method": cell.method or "search", "seed": cell.seed, "error": reason}
        for cell, reason in reasons
        if reason is not None
    ]
