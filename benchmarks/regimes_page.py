"""Writes docs/regimes.md and docs/regimes.png: budgets and tasks that were tried, and where an allocation matters.

    python -m benchmarks.regimes_page

A result file is the results.json of ``guilomo run benchmarks/regimes/NAME.yaml``, copied to
benchmarks/results/regimes/NAME.json.
"""

from __future__ import annotations

from itertools import combinations
from statistics import mean
from typing import Any

from benchmarks.recipe_results import ROOT, results_in, section
from benchmarks.regimes_figure import write_figure

PAGE = ROOT / "docs" / "regimes.md"
NOVELS = ("novels-480", "novels-1120", "novels-2240", "novels-5780")
"""The runs of the picture: one task at rising budgets."""
CHANCE = "novels-1120-chance"
EARLIER = ("novels-long", "shakespeare-ranks", "sst2-small-budget")
HEAD = """# Where does allocation matter?

TODO
"""
BEFORE = """# What was tried before

TODO
"""


def chance_note(results: dict[str, dict[str, Any]]) -> str:
    """What a search is worth in random plans, from all that were trained at one budget."""
    searched = mean(_losses(results["novels-1120"], "guilomo"))
    random = [*_losses(results["novels-1120"], "random"), *_losses(results[CHANCE], "random")]
    as_good = sum(loss <= searched for loss in random)
    best_of_four = mean(min(four) for four in combinations(random, 4))
    return (
        f"Of {len(random)} random plans of 1,120 parameters ({len(_losses(results[CHANCE], 'random'))} more are in "
        f"`{CHANCE}`), {as_good} were as good as the search is on average ({searched:.3f}); their mean is "
        f"{mean(random):.3f}. The search costs about as much as four of these short trainings. The best of four random "
        f"plans, were it known which is best, has {best_of_four:.3f} on average.\n"
    )


def _losses(results: dict[str, Any], name: str) -> list[float]:
    method = next(method for method in results["methods"] if method["name"] == name)
    return [run["metrics"]["loss"]["value"] for run in method["runs"]]


def page() -> str:
    """The whole page."""
    results = results_in("regimes")
    now = [*NOVELS, *(name for name in results if name not in (*NOVELS, *EARLIER, CHANCE))]
    parts = [HEAD, chance_note(results), *_sections(results, now), BEFORE, *_sections(results, EARLIER)]
    return "\n".join(parts)


def _sections(results: dict[str, dict[str, Any]], names: Any) -> list[str]:
    return [section(results[name], "benchmarks/regimes") for name in names]


if __name__ == "__main__":
    found = results_in("regimes")
    PAGE.write_text(page(), encoding="utf-8")
    write_figure([found[name] for name in NOVELS], PAGE.with_suffix(".png"))
