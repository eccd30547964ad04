"""Writes docs/results.md from the result files of the shipped recipes.

    python -m benchmarks.recipe_results

A result file is the results.json of ``guilomo run recipes/NAME.yaml``, copied to benchmarks/results/recipes/NAME.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = ROOT / "benchmarks" / "results" / "recipes"
PAGE = ROOT / "docs" / "results.md"

HEAD = """# Results of the shipped recipes

Made by `python -m benchmarks.recipe_results` from the files in `benchmarks/results/recipes`, each the `results.json` of
one run. All methods of a run have the same budget of trainable parameters (routers included, task heads not), the same
rows and the same learning rate; no rate was tuned. These runs show that the recipes work from end to end. They are too
small, and most have too few seeds, to show which method is better; the plain words under each table say what its
numbers allow. All but the demo ran on one thread, two at a time, so that their times are upper bounds.
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


def section(results: dict[str, Any]) -> str:
    """One run: what it was, the table, the verdict."""
    data, metric = results["data"], results["primary_metric"]
    columns = [metric] + [name for name in ("loss",) if name != metric]
    seeds = results["config"]["seeds"]
    search = results["search"] or {"seconds": 0}
    sizes = " and ".join(f"{data['sizes'][s]} {s.replace('_', '-')}" for s in ("train", "held_out", "test"))
    name, cores = results["name"], results["hardware"]["cores"]
    lines = [
        f"## {name}",
        "",
        f"`guilomo run recipes/{name}.yaml`: {data['kind']}, model `{results['model']['name']}`, {sizes} rows, budget "
        f"{results['budget']['parameters']:,} parameters, seeds {', '.join(map(str, seeds))}. "
        f"Search {search['seconds']:.0f} s, all {results['seconds']['total']:.0f} s on {cores} cores.",
        "",
        f"| method | {' | '.join(columns)} | parameters |",
        f"| --- | {' | '.join('---:' for _ in columns)} | ---: |",
    ]
    for method in results["methods"]:
        cells = " | ".join(show(method["summary"], name) for name in columns)
        lines.append(f"| {method['label']} | {cells} | {method['parameters']:,} |")
    chance = data.get("chance")
    if chance is not None and metric == "accuracy":
        lines += ["", f"Always saying the most frequent class gives {100 * chance:.1f}."]
    lines += ["", *[f"- {sentence}" for sentence in results["verdict"]], ""]
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FILES.glob("*.json"))]
    return HEAD + "\n" + "\n".join(section(results) for results in found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
