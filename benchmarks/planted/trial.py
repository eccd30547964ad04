"""One search on one planted world, and what an allocation is worth in a fresh training at the same budget."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from scipy.stats import spearmanr

from benchmarks.planted.worlds import World
from guilomo import Allocation, LoraMoeConfig, ModulePlan, ModuleShape
from guilomo.allocation.chance import random_plan
from guilomo.allocation.uniform import uniform
from guilomo.search import SearchConfig, SearchResult, search, search_sized
from guilomo.tuner import target_shapes

SEARCHES: dict[str, dict[str, Any]] = {
    "guilomo": {},
    "soft": {"masks": "soft"},
    "hard": {"masks": "hard"},
    "prefix": {"relaxation": "prefix"},
    "authors_code": {"relaxation": "prefix", "hypergradient": "authors_code"},
}
"""The default search and what it was chosen over."""
ALPHA: dict[str, Any] = {"alpha": 4.0, "scaling": "constant"}
RATE = 1e-2


def search_config(world: World, seed: int, name: str) -> SearchConfig:
    """Options of one of `SEARCHES` on a world."""
    options = {
        "max_experts": 1,
        "top_k": _top_k(world),
        "learning_rate": RATE,
        "outer_learning_rate": 0.05,
        "patience": 0,
        "record_every": 50,
        "seed": seed,
        **world.search,
        **SEARCHES[name],
    }
    if options.get("relaxation") == "prefix" and options.get("min_experts") == 0:
        del options["min_experts"]  # the paper's rule keeps at least one expert
    return SearchConfig(**options)


def run_search(world: World, config: SearchConfig) -> SearchResult:
    """Searches at the cost of what was planted."""
    torch.manual_seed(config.seed)
    same = {"lora_alpha": ALPHA["alpha"], "scaling": ALPHA["scaling"], "balance_loss": None}
    sized = search_sized(config, **same, target_modules=world.targets)
    return search(get_peft_model(copy.deepcopy(world.base), sized), world.data, config, budget(world))


def budget(world: World) -> int:
    """Parameters of the planted allocation."""
    return planted_plan(world).parameters()


def planted_plan(world: World) -> Allocation:
    """The allocation that fits the planted change exactly."""
    shapes = _shapes(world)
    if world.axis == "ranks":
        plans = {n: ModulePlan(*shapes[n], (r,) if r else (), 1) for n, r in world.planted.items()}
    else:
        rank = world.search["max_rank"]
        plans = {n: ModulePlan(*shapes[n], (rank,) * e, min(2, e)) for n, e in world.planted.items()}
    return Allocation(plans, **ALPHA)


def chance_plan(world: World, seed: int) -> Allocation:
    """A random plan of the same cost from what the search may choose."""
    config = search_config(world, seed, "guilomo")
    space = {"min_experts": config.least_experts, "max_experts": config.max_experts, "max_rank": config.max_rank}
    floor = {"top_k": config.top_k, "top_k_floor": config.top_k_floor}
    return random_plan(_shapes(world), budget(world), seed, **space, **floor, **ALPHA)


def even_plan(world: World) -> Allocation:
    """The same experts and ranks everywhere, of the same cost."""
    experts = 1 if world.axis == "ranks" else round(sum(world.planted.values()) / len(world.planted))
    return uniform(_shapes(world), budget=budget(world), experts=experts, top_k=_top_k(world), **ALPHA)


def found_counts(world: World, plan: Allocation) -> list[int]:
    """What a plan gives each module, in the order of `World.planted`."""
    return [plan[n].rank if world.axis == "ranks" else plan[n].experts for n in world.planted]


def wished_counts(world: World, result: SearchResult) -> list[float]:
    """What a search wished for each module before the projection, in the order of `World.planted`."""
    experts, ranks = result.preference.experts, result.preference.ranks
    return [experts[n] * ranks[n][0] if world.axis == "ranks" else experts[n] for n in world.planted]


def agreement(world: World, counts: list[int] | list[float]) -> float | None:
    """Spearman correlation over modules of what was planted and `counts`; None where all counts are equal."""
    if len(set(counts)) == 1:
        return None
    return float(spearmanr(list(world.planted.values()), counts).statistic)


def test_loss(world: World, plan: Allocation, seed: int) -> float:
    """Mean squared error of a fresh training on test rows, as a share of what the planted change does."""
    torch.manual_seed(seed)
    config = LoraMoeConfig(allocation=plan, balance_loss=None, target_modules=world.targets)
    model = get_peft_model(copy.deepcopy(world.base), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    order = torch.Generator().manual_seed(seed)  # all plans see the same rows
    size, data = (world.search["batch_size"],), world.data
    for step in range(world.train_steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - 0.9 * step / world.train_steps)
        rows = [data.train[i] for i in torch.randint(len(data.train), size, generator=order).tolist()]
        optimizer.zero_grad()
        _loss(model, world, rows).backward()
        optimizer.step()
    with torch.no_grad():
        return float(_loss(model.eval(), world, data.test)) / world.effect


def _top_k(world: World) -> int:
    return 2 if world.axis == "experts" else 1


def _loss(model: PeftModel, world: World, rows: Any) -> torch.Tensor:
    batch = world.data.collate(rows)
    labels = batch.pop("labels")
    output = model(**batch)
    return world.data.row_loss(getattr(output, "logits", output), labels)[0].mean()


def _shapes(world: World) -> dict[str, ModuleShape]:
    return target_shapes(world.base, LoraMoeConfig(target_modules=world.targets))
