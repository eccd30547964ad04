"""The searches of a run: one for all training seeds, or one for each."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from scipy.stats import spearmanr

from guilomo.allocation import Allocation, RouterCost
from guilomo.run.config import RunConfig
from guilomo.run.files import read_json
from guilomo.search import SearchConfig

if TYPE_CHECKING:
    from guilomo.run.pipeline import Run


def search_seeds(config: RunConfig) -> list[int]:
    """The training seeds that have a search of their own; the first one's serves all unless asked otherwise."""
    return config.seeds if config.search_per_seed else config.seeds[:1]


def search_folder(config: RunConfig, seed: int) -> Path:
    """Where the search for a training seed lies."""
    folder = config.folder / "search"
    return folder / f"seed-{seed}" if config.search_per_seed else folder


def search_config(config: RunConfig, seed: int) -> SearchConfig:
    """The options of the search for a training seed."""
    if not config.search_per_seed:
        return config.search
    return config.search.model_copy(update={"seed": config.search.seed + seed})


def searches_of(run: Run) -> dict[str, Any] | None:
    """The ``search`` part of results.json: the first finished search; None if there is none.

    With a search per seed also ``searches``, one entry per seed, and their ``agreement``.
    """
    config = run.config
    places = {seed: search_folder(config, seed) for seed in search_seeds(config)}
    found = {seed: read_json(p / "search.json") for seed, p in places.items() if (p / "search.json").exists()}
    if not found:
        return None
    first: dict[str, Any] = next(iter(found.values()))
    if not config.search_per_seed:
        return first
    plans = {seed: Allocation.load(places[seed] / "allocation.json") for seed in found}
    searches = [
        {
            "seed": seed,
            "search_seed": search_config(config, seed).seed,
            **{key: search[key] for key in ("steps", "seconds", "stopped_early", "moved")},
            "allocation": plans[seed].to_dict(),
        }
        for seed, search in found.items()
    ]
    return {**first, "searches": searches, "agreement": agreement(list(plans.values()), run.router_cost)}


def agreement(plans: list[Allocation], router: RouterCost) -> float | None:
    """Mean over pairs of plans of Spearman's correlation between their parameters per module (ours).

    1: all searches rank the modules alike. None with fewer than two plans, or where a plan gives all modules the same.
    """
    sizes = [[row["parameters"] for row in plan.rows(router)] for plan in plans]
    if len(sizes) < 2 or any(len(set(size)) < 2 for size in sizes):
        return None
    return mean(float(spearmanr(a, b).statistic) for a, b in combinations(sizes, 2))
