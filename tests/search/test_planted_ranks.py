"""Does the search find anything? Networks whose layers were changed by updates of known ranks."""

from __future__ import annotations

import copy

import torch
from peft import get_peft_model
from scipy.stats import spearmanr
from search_tools import Regression, Residual

from guilomo.allocation.chance import random_plan
from guilomo.search import SearchConfig, SearchResult, search, search_sized

WIDTH, MAX_RANK = 32, 8


def _planted(ranks: list[int], rows: int) -> tuple[Residual, Regression]:
    """A network, and data from a copy of it in which layer i differs by an update of rank ``ranks[i]``."""
    net = Residual(len(ranks), WIDTH)
    teacher = copy.deepcopy(net)
    with torch.no_grad():
        for layer, rank in zip(teacher.layers, ranks, strict=True):
            if rank:
                u, v = (torch.linalg.qr(torch.randn(WIDTH, rank))[0] for _ in range(2))
                layer.weight += u @ v.T
        x = torch.randn(2 * rows, WIDTH)
        y = teacher(x)
    return net, Regression(x, y + 0.05 * y.std() * torch.randn_like(y))


def _find(ranks: list[int], seed: int, **options: object) -> SearchResult:
    torch.manual_seed(seed)
    net, data = _planted(ranks, rows=768)
    given = {
        "max_experts": 1,
        "top_k": 1,
        "max_rank": MAX_RANK,
        "steps": 350,
        "warmup_steps": 30,
        "batch_size": 48,
        "held_out_batch_size": 48,
        "learning_rate": 1e-2,
        "outer_learning_rate": 0.05,
        "patience": 0,
        "record_every": 50,
        "seed": seed,
    }
    config = SearchConfig(**{**given, **options})
    model = get_peft_model(net, search_sized(config, target_modules=r"layers\.\d+", lora_alpha=8.0))
    return search(model, data, config, budget=2 * WIDTH * sum(ranks))


def _agreement(planted: list[int], found: list[float]) -> float:
    return float(spearmanr(planted, found).statistic)


def test_planted_ranks_are_found_and_random_plans_do_not_find_them() -> None:
    learned, by_chance = [], []
    for seed in range(3):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
        planted = [[0, 1, 2, 3, 4, 5, 6, 6][i] for i in order]
        result = _find(planted, seed)
        wishes = result.preference.ranks
        learned.append(_agreement(planted, [wishes[f"layers.{i}"][0] for i in range(8)]))
        plan = result.allocation
        assert 0.99 * result.budget <= plan.parameters() <= result.budget
        for draw in range(20):
            chance = random_plan(plan.shapes(), plan, draw, max_experts=1, max_rank=MAX_RANK, top_k=1)
            by_chance.append(_agreement(planted, [chance[f"layers.{i}"].rank for i in range(8)]))
    assert sum(learned) / 3 >= 0.6
    assert abs(sum(by_chance) / len(by_chance)) <= 0.2


def test_modules_that_need_nothing_go_unadapted() -> None:
    """With min_experts = 0, layers that were not changed are left without an adapter."""
    planted = [4, 0, 4, 0, 0, 4]
    result = _find(planted, seed=0, min_experts=0)
    kept = {name for name, plan in result.allocation.modules.items() if plan.adapted}
    assert kept == {"layers.0", "layers.2", "layers.5"}
    assert 0.99 * result.budget <= result.allocation.parameters() <= result.budget
