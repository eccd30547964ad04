"""One world with one seed: all its searches, and fresh trainings of what they found and of the controls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.planted.trial import (
    agreement,
    budget,
    chance_plan,
    even_plan,
    found_counts,
    planted_plan,
    run_search,
    search_config,
    test_loss,
    wished_counts,
)
from benchmarks.planted.worlds import WORLDS, World
from guilomo.search import SearchResult

PLANS, TRAINED = 20, 3
"""Random plans per cell, and how many of them are trained."""


def cell_options(world: World, seed: int, searches: Sequence[str]) -> dict[str, Any]:
    """All that decides the numbers of a cell but the code and the versions."""
    configs = {name: search_config(world, seed, name).model_dump(mode="json") for name in searches}
    return {"searches": configs, "train_steps": world.train_steps, "random_plans": PLANS, "random_trained": TRAINED}


def run_cell(name: str, seed: int, searches: Sequence[str]) -> dict[str, Any]:
    """The JSON-ready record of a cell; losses are shares of the planted effect."""
    torch.set_num_threads(1)  # sums in one order: the same numbers again
    started = time.perf_counter()
    world = WORLDS[name](seed)
    results = {search: run_search(world, search_config(world, seed, search)) for search in searches}
    chance = [chance_plan(world, PLANS * seed + draw) for draw in range(PLANS)]
    plans = {search: result.allocation for search, result in results.items()}
    plans |= {"planted": planted_plan(world), "uniform": even_plan(world)}
    drawn = [test_loss(world, plan, seed) for plan in chance[:TRAINED]]
    losses = {label: test_loss(world, plan, seed) for label, plan in plans.items()}
    agreements = [agreement(world, found_counts(world, plan)) or 0.0 for plan in chance]
    return {
        "world": name,
        "seed": seed,
        "options": cell_options(world, seed, searches),
        "budget": budget(world),
        "planted": world.planted,
        "searches": {search: _found(world, result) for search, result in results.items()},
        "random": {"spearman": sum(agreements) / PLANS, "losses": drawn},
        "losses": {**losses, "random": sum(drawn) / TRAINED},
        "seconds": round(time.perf_counter() - started, 1),
    }


def _found(world: World, result: SearchResult) -> dict[str, Any]:
    found, wished = found_counts(world, result.allocation), wished_counts(world, result)
    return {
        "found": found,
        "expected": [round(count, 3) for count in wished],
        "spearman": agreement(world, found),
        "spearman_expected": agreement(world, wished),
        "parameters": result.allocation.parameters(),
        "moved": result.moved.to_dict(),
        "seconds": round(result.seconds, 1),
    }
