"""Writes docs/results.md from the result files of the shipped recipes.

    python -m benchmarks.recipe_results

A result file is the results.json of ``guilomo run recipes/NAME.yaml``, copied to benchmarks/results/recipes/NAME.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = """# Results of the shipped recipes

Made by `python -m benchmarks.recipe_results` from the files in `benchmarks/results/recipes`, each the `results.json` of
one run. All methods of a run have the same budget of trainable parameters (routers included, task heads not) and the
same rows. Where a column `rate` stands, each method was trained at every rate of the recipe's sweep and the one of the
lowest held-out loss was kept; `edge` says that it lies at an end of the sweep. LoRA, uniform, MoLA and AlphaLoRA have
one plan; the random control draws a plan for every seed, and where the recipe says `search_per_seed` so does the
search; `shuffled` deals the searched experts out anew among modules of equal shape.

*GuiLoMo's loss minus this* is the difference in loss per row, paired by row and seed, with its 95 % interval and its
p-value after Holm's correction over all tests of the run; below 0 the search is better. Intervals of single methods
include the choice of test rows, which all methods share, so that they overlap more than the differences do. The plain
words under each table say what its numbers allow. Most ran on one thread, two or three at a time, so that their times
are upper bounds. Budgets at which an allocation matters are in [regimes.md](regimes.md).
"""


def show(summary: dict[str, Any], name: str) -> str:
    """A mean with its interval; accuracies in percent."""
    found = summary.get(name)
    if not found or found["mean"] is None:
        return "–"
    factor, digits = (100, 1) if name in ("accuracy", "exact_match", "f1") else (1, 3)
    numbers = [found[key] for key in ("mean", "low", "high")]
    mean, low, high = ("–" if v is None else f"{v * factor:.{digits}f}" for v in numbers)
    return f"{mean} [{low}, {high}]"


def lead(results: dict[str, Any], method: dict[str, Any]) -> str:
    """The paired difference in loss per row of the searched method and another; below 0 the search is better."""
    tests = (t for t in results["tests"] if t["b"] == method["name"] and t["metric"] == "loss")
    found = next(tests, None)
    if found is None:
        return "–"
    p = found["p_corrected"]
    sign = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return f"{found['difference']:.3f} [{found['low']:.3f}, {found['high']:.3f}], {sign}"


def rate_of(method: dict[str, Any]) -> str:
    """The learning rate that a method's sweep chose."""
    sweep = method["sweep"]
    return f"{sweep['chosen']:g}{' (edge)' if sweep['edge'] else ''}"


def movement(search: dict[str, Any]) -> list[str]:
    """How far the search moved, and how well the searches of several seeds agree."""
    moved = search.get("moved")
    if not moved:
        return []
    text = f"The search moved expected ranks by {moved['ranks']['mean']:.2f}"
    text += f" and expert counts by {moved['experts']['mean']:.2f} on average"
    agreement = search.get("agreement")
    return [text + ("." if agreement is None else f"; searches of other seeds agree at Spearman {agreement:.2f}.")]


def section(results: dict[str, Any], folder: str) -> str:
    """One run: what it was, the table, the verdict."""
    data, metric = results["data"], results["primary_metric"]
    columns = [metric] + [name for name in ("loss",) if name != metric]
    seeds, seconds = results["config"]["seeds"], results["seconds"]
    sizes = " and ".join(f"{data['sizes'][s]} {s.replace('_', '-')}" for s in ("train", "held_out", "test"))
    name, cores = results["name"], results["hardware"]["cores"]
    swept = any(method.get("sweep") for method in results["methods"])
    head = [*columns, "GuiLoMo's loss minus this", "parameters", *(["rate"] if swept else [])]
    lines = [
        f"## {name}",
        "",
        f"`guilomo run {folder}/{name}.yaml`: {data['kind']}, model `{results['model']['name']}`, {sizes} rows, budget "
        f"{results['budget']['parameters']:,} parameters, seeds {', '.join(map(str, seeds))}. "
        f"Searches {seconds.get('search', 0):.0f} s, all {seconds['total']:.0f} s on {cores} cores.",
        "",
        f"| method | {' | '.join(head)} |",
        f"| --- | {' | '.join('---:' for _ in head)} |",
    ]
    for method in results["methods"]:
        cells = " | ".join(show(method["summary"], name) for name in columns)
        rate = f" {rate_of(method)} |" if swept else ""
        lines.append(f"| {method['label']} | {cells} | {lead(results, method)} | {method['parameters']:,} |{rate}")
    chance = data.get("chance")
    if chance is not None and metric == "accuracy":
        lines += ["", f"Always saying the most frequent class gives {100 * chance:.1f}."]
    lines += ["", *[f"- {sentence}" for sentence in (*results["verdict"], *movement(results["search"] or {}))], ""]
    return "\n".join(lines)


def results_in(folder: str) -> dict[str, dict[str, Any]]:
    """The result files of a folder by name, in the order of their names."""
    files = sorted((ROOT / "benchmarks" / "results" / folder).glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}


def page() -> str:
    """The whole page."""
    return RESULTS + "\n" + "\n".join(section(found, "recipes") for found in results_in("recipes").values())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
