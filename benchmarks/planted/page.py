"""Writes docs/planted.md and docs/planted.png from benchmarks/results/planted.json.

    python -m benchmarks.planted.page

The committed page is checked against the committed result file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.planted.figure import write_figure

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks" / "results" / "planted.json"
PAGE = ROOT / "docs" / "planted.md"

HEAD = """# Does the search find what was planted?

On real data nobody knows the right allocation. Here it is known. A network is changed by low-rank updates, some
modules by much and some by nothing; the changed network makes data, with noise; the search gets the unchanged
network, the data, and a budget equal to the cost of the planted allocation. What it finds is compared with what was
planted.

![Planted and found counts, and the Spearman correlation of every search](planted.png)

*A dot is a module; larger ones are several, over all seeds. On the line, the search found what was planted.*

| world | what is planted |
| --- | --- |
| residual-ranks | a residual network of 8 linear layers, width 64; each layer changed by a matrix of rank 0 to 8 |
| transformer-ranks | a Llama of 2 layers, width 48; its 14 linears changed by matrices of rank 0 to 6 |
| residual-experts | a residual network of 6 layers, width 48; rows of 8 kinds, which each layer sorts into 1 to 8 \
groups and changes each group its own way |

All directions of a change weigh the same, so that a rank is needed in full. In the rank worlds a module may get
nothing. Found counts are those of the plan, after the projection onto the budget. *Spearman* correlates planted and
found counts over the modules (a plan that is the same everywhere counts as 0); *random* is the mean of 20 random
plans per seed, which leave modules out where the search may, so that *uniform* is the harder control there.
Losses are those of fresh trainings on test rows at equal budget, as shares of what the planted change
does to the outputs: 1 is the unadapted network, 0.01 is the noise. *Minus uniform* and *minus random* are differences
of losses, paired by seed; below 0 is better. All intervals are 95 %, Student's t over seeds, which does not know that
correlations end at 1.

| search | |
| --- | --- |
| guilomo | the default: `survival`, sampled masks |
| soft, hard | the same with soft masks; with masks that are on from one half |
| prefix | the paper's straight-through rule, first-order hypergradient |
| authors_code | the paper's rule with what the released code computes |

Searches that the table of a world does not list were left out there for time.
"""

WHY = """## Why sampled masks are the default

A soft mask can be undone. A component that is half on contributes as if it were whole once its weights have doubled,
and the inner steps see to that. At the inner optimum the loss no longer depends on the mask, and its gradient
vanishes. Here soft masks find part of the ranks of residual-ranks and nothing in the other worlds. A hard mask with a
threshold at one half starves: what falls below learns nothing any more, and what has learned nothing looks useless.
Sampled masks switch every component truly on and off, for every row anew, so that it keeps learning while it is in
doubt and its absence shows in the loss.

Ranks, and whether a module is adapted at all, learn from slopes taken at both ends, on and off, which together give the
difference that a component makes. For expert counts slopes say almost nothing: behind a router, a little more of one
expert is not what one more expert would be. So counts learn from losses: every held-out row is seen under two draws,
and the difference of the two losses, times the difference of the scores of the draws, estimates the gradient
(`guilomo/search/draws.py`).

## What this does not show

In residual-experts the order of the counts is found, but not their size: the search takes more experts than were
planted, each of lower rank, and its test loss lies between that of the planted and that of the uniform plan.

These worlds are easy: widths of 48 and 64, squared error, changes that are exactly of low rank with directions that
weigh the same, and a budget known to be the right one. In pretrained models needs fall off gradually and no
allocation is the true one; whether a searched allocation is worth its search there is another question, see
[regimes.md](regimes.md).
"""


def page() -> str:
    """The whole page."""
    results = json.loads(FILE.read_text(encoding="utf-8"))
    sections = [_section(name, world, results["cells"]) for name, world in results["summary"].items()]
    return "\n".join([HEAD, *sections, WHY, _made(results)])


def _section(name: str, world: dict[str, Any], cells: list[dict[str, Any]]) -> str:
    lines = [
        f"## {name}",
        "",
        "| allocation | Spearman | test loss | minus uniform | minus random |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for label in world["test_loss"]:
        minus = world["test_loss_minus"].get(label, {})
        scores = [world["spearman"].get(label), world["test_loss"][label], minus.get("uniform"), minus.get("random")]
        lines.append(f"| {label} | {' | '.join(map(_show, scores, (2, 3, 3, 3)))} |")
    lines += ["", _facts([cell for cell in cells if cell["world"] == name]), ""]
    lines += [_verdict(goal, met, world["spearman"]) for goal, met in world["goals"].items()]
    return "\n".join([*lines, ""])


def _verdict(goal: str, met: bool, spearman: dict[str, Any]) -> str:
    """A goal, and what was found instead where a correlation missed it."""
    if met:
        return f"- Met: {goal}."
    score = spearman.get(goal.partition(" ")[0])
    if score is None:
        return f"- **Missed**: {goal}."
    unsure = score["low"] is None or score["low"] <= 0 <= score["high"]
    instead = ", an interval that does not exclude 0" if unsure else ""
    return f"- **Missed**: {goal}; found {_show(score, 2)}{instead}."


def _facts(cells: list[dict[str, Any]]) -> str:
    """How many, what chance would give, and how long it took."""
    seeds, modules = len(cells), len(cells[0]["planted"])
    scatter = (seeds * (modules - 1)) ** -0.5  # Spearman's variance under independence is 1 / (modules - 1)
    seconds = [cell["searches"]["guilomo"]["seconds"] for cell in cells]
    return (
        f"{seeds} seeds, {modules} modules. Of a search that finds nothing, the mean Spearman would scatter around 0 "
        f"with a standard deviation of {scatter:.2f}. A default search took {min(seconds):.0f} to {max(seconds):.0f} s."
    )


def _show(score: dict[str, Any] | None, digits: int) -> str:
    """A mean with its interval."""
    if score is None:
        return "–"
    numbers = (score[key] for key in ("value", "low", "high"))
    # Adding 0 turns a rounded -0 into 0.
    mean, low, high = ("–" if n is None else f"{round(n, digits) + 0.0:.{digits}f}" for n in numbers)
    return f"{mean} [{low}, {high}]"


def _made(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("python", "torch", "transformers", "peft"))
    return (
        "## How it was made\n\n"
        f"`{results['command']}` on {results['hardware']['cores']} cores ({results['hardware']['cpu']}) that other "
        f"jobs shared; {versions}. The numbers are in `{FILE.relative_to(ROOT).as_posix()}`; this page and its picture "
        "come from `python -m benchmarks.planted.page`.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    write_figure(json.loads(FILE.read_text(encoding="utf-8")), PAGE.with_suffix(".png"))
