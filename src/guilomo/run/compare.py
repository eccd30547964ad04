"""Puts the finished parts of a run together: results.json, with tests and a verdict in plain words."""

from __future__ import annotations

import math
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np

import guilomo
from guilomo.allocation import Allocation, RouterCost
from guilomo.evaluation import chance_of, holm, mcnemar, paired_runs, t_interval
from guilomo.run import environment
from guilomo.run.bank_rows import XLORA
from guilomo.run.config import PLAIN_LORA, SEARCHED, MethodConfig
from guilomo.run.files import read_json
from guilomo.run.methods import ready_made, router_cost
from guilomo.run.searches import search_folder, search_seeds, searches_of
from guilomo.run.sweep import sweep_file

if TYPE_CHECKING:
    from guilomo.run.pipeline import Run

SCHEMA = 1
BOUNDS = {
    **dict.fromkeys(("accuracy", "accuracy_per_character", "exact_match", "f1"), (0.0, 1.0)),
    "matthews": (-1.0, 1.0),
    "loss": (0.0, math.inf),
    "perplexity": (1.0, math.inf),
}
"""Ends of the scales that intervals over few seeds could leave."""
NOUNS = {
    "accuracy": "accuracy",
    "accuracy_per_character": "accuracy per character",
    "exact_match": "exact match",
    "loss": "loss per row",
}
"""What tests can be of, in the words of a verdict."""
KINDS = {SEARCHED: "searched", PLAIN_LORA: "baseline"}


def results_of(run: Run) -> dict[str, Any]:
    """The content of results.json from the stages that are done."""
    config = run.config
    methods = [m for m in (method_row(run, method) for method in config.methods) if m is not None]
    wanted = len(config.methods) * len(config.seeds)
    search = searches_of(run)
    metric = config.evaluation.metric or leading_metric(methods)
    tests = _tests(methods, metric)
    return {
        "schema": SCHEMA,
        "guilomo": guilomo.__version__,
        "name": config.name,
        "command": run.command,
        "created": environment.now(),
        "status": "complete" if sum(len(m["runs"]) for m in methods) == wanted else "partial",
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "seconds": _seconds(methods, search),
        "config": config.model_dump(mode="json"),
        "data": data_facts(run),
        "model": {"name": config.model.path, "parameters": run.facts["parameters"]},
        "budget": {"parameters": run.facts["budget"], "source": run.facts["budget_source"]},
        "search": search,
        "methods": [{k: v for k, v in m.items() if k != "rows"} for m in methods],
        "tests": tests,
        "primary_metric": metric,
        "verdict": verdict(methods, tests) + sweep_notes(methods),
    }


def data_facts(run: Run) -> dict[str, Any]:
    """Name, hash and sizes of the data; for classification also the share of the most frequent test class."""
    task = run.task
    chance = chance_of(task) if task.kind == "classification" else None
    return {
        "name": task.name,
        "kind": task.kind,
        "hash": task.data_hash,
        "sizes": {split: len(task.rows(split)) for split in ("train", "held_out", "test")},
        "labels": task.labels,
        "chance": None if chance is None else round(chance, 4),
        "truncated": sum(task.truncated.values()),
    }


def _seconds(methods: list[dict[str, Any]], search: dict[str, Any] | None) -> dict[str, float]:
    """Time by stage; the training at a sweep's chosen rate counts as the first seed's, not as the sweep's."""
    searches = [] if search is None else search.get("searches", [search])
    found = {
        "search": sum(one["seconds"] for one in searches),
        "sweep": sum(cell["seconds"] for m in methods if m["sweep"] for cell in _not_chosen(m["sweep"])),
        "train": sum(r["train_seconds"] for m in methods for r in m["runs"]),
    }
    if not any(m["sweep"] for m in methods):
        del found["sweep"]
    return {name: round(seconds, 1) for name, seconds in {**found, "total": sum(found.values())}.items()}


def _not_chosen(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in sweep["rates"] if cell["learning_rate"] != sweep["chosen"]]


def method_row(run: Run, method: MethodConfig) -> dict[str, Any] | None:
    """One row: plan, costs, runs; None before its plan is known, or, from ready-made things, what it trains."""
    folder = run.config.folder / "methods" / method.name
    places = [folder / f"seed-{seed}" for seed in run.config.seeds]
    if method.strategy == SEARCHED:
        places = [search_folder(run.config, seed) for seed in search_seeds(run.config)]
    plans = [Allocation.load(p / "allocation.json") for p in places if (p / "allocation.json").exists()]
    found = [folder / f"seed-{seed}" / "result.json" for seed in run.config.seeds]
    full = [read_json(path) for path in found if path.exists()]
    if not plans or (ready_made(method) is not None and not full):
        return None
    router = router_cost(run.config, method)
    runs = [{k: v for k, v in r.items() if k != "rows"} for r in full]
    return {
        "name": method.name,
        "label": method.label,
        "kind": KINDS.get(method.strategy, "control"),
        "allocation": plans[0].to_dict(),
        **_costs(method, plans, router, runs),
        "sweep": _sweep(run, method),
        "runs": runs,
        "summary": _summary([r["metrics"] for r in runs]),
        "parts": {part: _summary([r["parts"][part] for r in runs]) for part in (runs[0]["parts"] if runs else ())},
        "rows": [r["rows"] for r in full],
    }


def _costs(
    method: MethodConfig, plans: list[Allocation], router: RouterCost, runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """From ready-made things, what was trained beside frozen ones is known once it has been; else by the plan."""
    costs = {
        "parameters": max(plan.parameters(router) for plan in plans),
        "active_parameters": mean(plan.active_parameters(router) for plan in plans),
        "flops_per_token": mean(plan.flops_per_token(router) for plan in plans),
    }
    if ready_made(method) is None:
        return costs
    trained = max(run["trained_parameters"] for run in runs)
    if method.strategy == XLORA:  # the classifier beside all adapters
        costs["active_parameters"] = trained + mean(plan.active_parameters(lambda *_: 0) for plan in plans)
    return {**costs, "parameters": trained}


def _sweep(run: Run, method: MethodConfig) -> dict[str, Any] | None:
    path = sweep_file(run, method)
    return {k: v for k, v in read_json(path).items() if k != "data_hash"} if path.exists() else None


def _summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean of every metric over seeds, with an interval for the choice of test rows and the luck of training."""
    out: dict[str, Any] = {}
    for name in seeds[0] if seeds else ():
        scores = [metrics[name] for metrics in seeds]
        low, high = _interval(scores, *BOUNDS.get(name, (-math.inf, math.inf)))
        # A value that is not finite is written as null, and so is a mean that rests on one.
        known = all(score["value"] is not None for score in scores)
        centre = mean(score["value"] for score in scores) if known else None
        out[name] = {"mean": centre, "low": low, "high": high, "seeds": len(seeds), "n": scores[0]["n"]}
    return out


def _interval(scores: list[dict[str, Any]], least: float, most: float) -> tuple[float | None, float | None]:
    """Half-widths of two sources, added in quadrature: test rows (shared by all seeds) and seeds (Student's t)."""
    if any(score[key] is None for score in scores for key in ("value", "low", "high")):
        return None, None
    if len(scores) == 1:
        return scores[0]["low"], scores[0]["high"]
    over_seeds = t_interval([score["value"] for score in scores])
    luck = over_seeds.high - over_seeds.value
    below = mean(score["value"] - score["low"] for score in scores)
    above = mean(score["high"] - score["value"] for score in scores)
    centre = over_seeds.value
    return max(least, centre - math.hypot(luck, below)), min(most, centre + math.hypot(luck, above))


def leading_metric(methods: list[dict[str, Any]]) -> str:
    """The first of accuracy, exact match, perplexity and loss that was measured."""
    names = {name for m in methods for name in m["summary"]}
    return next((n for n in ("accuracy", "exact_match", "perplexity") if n in names), "loss")


def _tests(methods: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The searched method against every other, paired by test row and by seed; Holm over all of them."""
    searched = next((m for m in methods if m["kind"] == "searched" and m["rows"]), None)
    if searched is None:
        return []
    found = []
    for other in methods:
        if other is searched or len(other["rows"]) != len(searched["rows"]):
            continue
        for name in tested(metric, searched["rows"]):
            a, b = row_values(searched["rows"], name), row_values(other["rows"], name)
            found.append({"a": searched["name"], "b": other["name"], "metric": name, **paired_test(a, b, name)})
    for test, corrected in zip(found, holm([t["p"] for t in found]), strict=True):
        test["p_corrected"] = corrected
    return found


def paired_test(a: Any, b: Any, metric: str) -> dict[str, Any]:
    """Difference ``a - b`` of values ``(seeds, rows)`` with its interval, p-value and the name of the test."""
    found = paired_runs(a, b)
    p, test = found.p_value, "paired t over test rows and seeds" if len(a) > 1 else "paired bootstrap over test rows"
    if metric != "loss" and len(a) == 1:
        p, test = mcnemar(a[0] > 0, b[0] > 0).p_value, "exact McNemar test over test rows"
    score = found.score
    return {"difference": score.value, "low": score.low, "high": score.high, "p": p, "test": test}


def tested(metric: str, rows: list[dict[str, Any]]) -> list[str]:
    """The metrics that methods are tested in: that which says what rows are right, if there is one, and the loss.

    It is the leading metric where that is a share of right rows, else the first of NOUNS that was measured.
    """
    right = [name for name in (metric, *NOUNS) if all(name in r["hits"] for r in rows)]
    return [*right[:1], "loss"]


def row_values(rows: list[dict[str, Any]], metric: str) -> Any:
    """What is paired, ``(seeds, rows)``: the mean loss per prediction, or 1.0 where a row is right and else 0.0."""
    if metric == "loss":
        return np.array([np.array(r["row_loss"]) / np.maximum(np.array(r["row_tokens"]), 1) for r in rows])
    return np.array([r["hits"][metric] for r in rows], dtype=float)


def verdict(methods: list[dict[str, Any]], tests: list[dict[str, Any]]) -> list[str]:
    """What the numbers say and do not say, in plain sentences."""
    searched = next((m for m in methods if m["kind"] == "searched" and m["runs"]), None)
    if searched is None or not tests:
        return []
    labels = {m["name"]: m["label"] for m in methods}
    out = []
    for name, noun in NOUNS.items():
        group = [t for t in tests if t["metric"] == name]
        if not group:
            continue
        sure = [t for t in group if t["p_corrected"] < 0.05]
        better = [labels[t["b"]] for t in sure if (t["difference"] < 0) == (name == "loss")]
        worse = [labels[t["b"]] for t in sure if (t["difference"] < 0) != (name == "loss")]
        even = [labels[t["b"]] for t in group if t not in sure]
        out += _sentences(searched["label"], noun, better, worse, even)
    seeds = len(searched["runs"])
    if seeds < 3:
        runs = "one training run" if seeds == 1 else f"{seeds} training runs"
        out.append(f"Each method has {runs}; that says little about the luck of training: use more seeds.")
    return out


def sweep_notes(methods: list[dict[str, Any]]) -> list[str]:
    """A sentence on the methods whose learning rate was chosen at the edge of the grid."""
    edge = [m["label"] for m in methods if m["sweep"] and m["sweep"]["edge"]]
    if not edge:
        return []
    return [f"A better learning rate may lie beyond the grid for {listed(edge)}: widen sweep.learning_rates."]


def _sentences(label: str, noun: str, better: list[str], worse: list[str], even: list[str]) -> list[str]:
    out = []
    if better:
        out.append(f"{label} has better {noun} than {listed(better)} on these test rows (Holm-corrected p < 0.05).")
    if worse:
        out.append(f"{label} has worse {noun} than {listed(worse)} on these test rows (Holm-corrected p < 0.05).")
    if even:
        out.append(f"In {noun}, these results cannot tell {label} from {listed(even)}.")
    return out


def listed(names: list[str]) -> str:
    """Names as in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
