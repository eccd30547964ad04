"""Writes docs/results.md and docs/regimes.md from the result files of recipes.

    python -m benchmarks.recipe_results

A result file is the results.json of ``guilomo run FOLDER/NAME.yaml``, copied to benchmarks/results/FOLDER/NAME.json;
FOLDER is ``recipes`` for those that are shipped, and ``regimes`` for those that look for where allocation matters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = """# Results of the shipped recipes

Made by `python -m benchmarks.recipe_results` from the files in `benchmarks/results/recipes`, each the `results.json` of
one run. All methods of a run have the same budget of trainable parameters (routers included, task heads not) and the
same rows. Where a column `rate` stands, each method was trained at every rate of the recipe's sweep and the one of the
lowest held-out loss was kept; `edge` says that it lies at an end of the sweep. LoRA, uniform, MoLA and AlphaLoRA have
one plan; the random control draws a plan for every seed, and where the recipe says `search_per_seed` so does the
search. The plain words under each table say what its numbers allow. Most ran on one thread, two at a time, so that
their times are upper bounds.

The searches of these files, but for the demo's, were made with soft masks, the default before
[planted.md](planted.md) showed that they find little; their searched rows say nothing about the present default. The
other rows are not touched by that.
"""
REGIMES = """# Where does allocation matter?

Made by `python -m benchmarks.recipe_results` from the files in `benchmarks/results/regimes`; read as
[results.md](results.md). The recipes are in `benchmarks/regimes`. These runs use the present default search and look
for budgets and tasks where an allocation can matter. None is found yet, and the question is open.

Also tried, with one seed each; stopped before they were whole, so that no result file can be shown:

- `shakespeare-ranks` with modules that may go unadapted and with finer rates: 0.02 is the best rate for both, and the
  test loss is 3.194 for LoRA and 3.223 for GuiLoMo. So a difference at one coarse rate, as in the table of
  `shakespeare-ranks`, may be one of rates.
- The same at rank 1 with 8 epochs: held-out loss 3.036 for LoRA, 3.039 for GuiLoMo. The training loss falls to 2.69,
  while rank 2 had a held-out loss of 2.95 after 2 epochs: this little model is short of text there, not of capacity.

`novels-long`, below, is 7,500 blocks of novels in one pass at rank 1: there too it hardly matters where the ranks are.

Next: budgets below one rank per module, where the question is which modules are adapted at all. A first probe, one
seed, 1,600 parameters, 4,500 blocks of novels: test loss 3.025 for the searched plan (mostly value projections and the
last layer), 3.029, 3.050 and 3.058 for three random choices of modules, 3.067 for rank 1 on all query and value
projections (1,120 parameters).
"""
PAGES = {"results": ("recipes", RESULTS), "regimes": ("regimes", REGIMES)}
"""For each page of docs, the folder its results come from and what it begins with."""


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
    seeds = results["config"]["seeds"]
    search = results["search"] or {"seconds": 0}
    sizes = " and ".join(f"{data['sizes'][s]} {s.replace('_', '-')}" for s in ("train", "held_out", "test"))
    name, cores = results["name"], results["hardware"]["cores"]
    swept = any(method.get("sweep") for method in results["methods"])
    head = [*columns, "GuiLoMo's loss minus this", "parameters", *(["rate"] if swept else [])]
    lines = [
        f"## {name}",
        "",
        f"`guilomo run {folder}/{name}.yaml`: {data['kind']}, model `{results['model']['name']}`, {sizes} rows, budget "
        f"{results['budget']['parameters']:,} parameters, seeds {', '.join(map(str, seeds))}. "
        f"Search {search['seconds']:.0f} s, all {results['seconds']['total']:.0f} s on {cores} cores.",
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
    lines += ["", *[f"- {sentence}" for sentence in (*results["verdict"], *movement(search))], ""]
    return "\n".join(lines)


def page(name: str) -> str:
    """A whole page."""
    folder, head = PAGES[name]
    files = sorted((ROOT / "benchmarks" / "results" / folder).glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    where = folder if folder == "recipes" else f"benchmarks/{folder}"
    return head + "\n" + "\n".join(section(results, where) for results in found)


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / "docs" / f"{name}.md").write_text(page(name), encoding="utf-8")
