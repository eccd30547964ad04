"""Writes docs/family.md and its pictures: the whole family compared, on real tasks.

    python -m benchmarks.family_page

A result file is the compare.json of ``guilomo compare benchmarks/comparisons/NAME.yaml``, copied to
benchmarks/results/comparisons/NAME.json.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.family_notes import AFTER, BEFORE, GLUE, HEAD
from benchmarks.recipe_results import ROOT, results_in
from guilomo.compare.results import ALPHA
from guilomo.evaluation.ranks import above_share
from guilomo.report.family import plot_costs, plot_differences, plot_ranks
from guilomo.report.family.reading import tasks_of
from guilomo.report.family.rows import method_rows, mixtures, task_rows

PAGE = ROOT / "docs" / "family.md"
DPI = 110
GLUE_TASKS = ("mrpc", "cola", "rte")
PICTURES = {
    "differences": (plot_differences, "Every method's difference to plain LoRA, with intervals"),
    "step": (partial(plot_costs, what="step"), "Quality against step time"),
    "ranks": (plot_ranks, "Mean ranks, and who cannot be told apart"),
}


def page(results: dict[str, dict[str, Any]]) -> str:
    """The text of the page."""
    sections = [section(name, results[name]) for name in BEFORE if name in results]
    return "\n".join([HEAD, *sections, GLUE, *glue_table(results_in("recipes")), "", AFTER])


def glue_table(recipes: dict[str, dict[str, Any]]) -> list[str]:
    """Whether the best row of a shipped recipe is above naming the most frequent class, by the exact binomial test."""
    lines = [
        "| task | chance | best row | p, times the number of rows | above chance? |",
        "| --- | ---: | --- | ---: | --- |",
    ]
    for task in GLUE_TASKS:
        found = recipes[task]
        best = max(found["methods"], key=lambda method: method["summary"]["accuracy"]["mean"])
        score, chance = best["summary"]["accuracy"], found["data"]["chance"]
        right = math.floor(score["mean"] * score["n"])
        p = min(1.0, above_share(right, score["n"], chance) * len(found["methods"]))
        says = "yes" if p < ALPHA else "**no**"
        lines.append(
            f"| {task} | {100 * chance:.1f} | {best['label']}, {100 * score['mean']:.1f} of {score['n']} rows, "
            f"{score['seeds']} seeds | {p:.2g} | {says} |"
        )
    return lines


def section(name: str, found: dict[str, Any]) -> str:
    """One comparison: what was run, what it says, its pictures and tables."""
    config, hardware = found["config"], found["hardware"]
    seeds = ", ".join(map(str, config["seeds"]))
    rates = config["sweep"]["learning_rates"]
    swept = f"learning rates {', '.join(f'{rate:g}' for rate in rates)}, chosen on held-out rows; " if rates else ""
    lines = [
        f"## {name}",
        "",
        f"`guilomo compare benchmarks/comparisons/{name}.yaml`: model `{config['model']['path']}`, "
        f"{len(found['methods'])} methods, seeds {seeds}; {swept}{hardware['cores']} CPU cores.",
        "",
        BEFORE.get(name, ""),
        "",
        *[f"- {sentence}" for sentence in found["verdict"]],
        "",
        *tasks_table(found),
        "",
        *methods_table(found),
        "",
        *[line for mixture in mixtures(found) for line in [*parts_table(mixture), ""]],
        *[f"![{PICTURES[what][1]}](family/{name}-{what}.png)\n" for what in shown(found)],
    ]
    return "\n".join(lines)


def shown(found: dict[str, Any]) -> list[str]:
    """The pictures there is something in: ranks are over the tasks that count."""
    return [what for what in PICTURES if what != "ranks" or found["friedman"]]


def tasks_table(found: dict[str, Any]) -> list[str]:
    """What every task is, and whether anything is learned there."""
    lines = [
        "| task | train / held-out / test rows | metric | chance | budget | above chance? |",
        "| --- | --- | --- | ---: | ---: | --- |",
    ]
    for row in task_rows(found):
        verdict = "" if row["counted"] else "**no, left out of the verdict.** "
        lines.append(
            f"| {row['name']} | {row['sizes']} | {row['metric']} | {row['chance']} | {row['budget']} | "
            f"{verdict}{row['note']} |"
        )
    return lines


def methods_table(found: dict[str, Any]) -> list[str]:
    """Scores with intervals, ranks and costs, best mean rank first."""
    tasks = tasks_of(found)
    head = ["method", *(task.name for task in tasks), "mean rank", "parameters", "step ÷ LoRA", "memory ÷ LoRA"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in method_rows(found):
        cells = [_cell(cell) for cell in row["cells"]]
        name = f"{row['label']} (experimental)" if row["maturity"] == "experimental" else row["label"]
        lines.append(f"| {' | '.join([name, *cells, row['rank'], row['parameters'], row['step'], row['memory']])} |")
    return lines


def parts_table(mixture: dict[str, Any]) -> list[str]:
    """Scores on the parts of a mixed task."""
    lines = [
        f"| on each part of {mixture['task']} | {' | '.join(mixture['parts'])} |",
        f"| --- |{' ---: |' * len(mixture['parts'])}",
    ]
    for row in mixture["rows"]:
        cells = [f"{cell['value']} {cell['interval']}".strip() for cell in row["cells"]]
        lines.append(f"| {' | '.join([row['label'], *cells])} |")
    return lines


def _cell(cell: dict[str, Any]) -> str:
    """A mean with its interval; bold where it differs from LoRA beyond noise; what is not done, in words."""
    marks = {"better": "**better** ", "worse": "**worse** "}
    text = f"{marks.get(cell['outcome'], '')}{cell['value']} {cell['interval']}".strip()
    return ", ".join(part for part in (text, cell["alarm"], cell["missing"]) if part)


def write_pictures(name: str, found: dict[str, Any], folder: Path) -> None:
    """The comparison's pictures as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for what in shown(found):
        PICTURES[what][0](found).savefig(folder / f"{name}-{what}.png", dpi=DPI)


if __name__ == "__main__":
    comparisons = results_in("comparisons")
    for title, comparison in comparisons.items():
        write_pictures(title, comparison, PAGE.parent / "family")
    PAGE.write_text(page(comparisons), encoding="utf-8")
