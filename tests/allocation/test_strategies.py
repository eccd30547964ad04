from __future__ import annotations

from typing import Any

import pytest

from guilomo.allocation import (
    STRATEGIES,
    Allocation,
    ModuleShape,
    Preference,
    fit,
    hilo,
    layers_of,
    lora,
    make,
    mola,
    no_router,
    normal,
    random_plan,
    rank_ramp,
    shuffled,
    strategy_options,
    uniform,
)
from guilomo.allocation.layerwise import spread_groups
from guilomo.errors import GuilomoError

Shapes = dict[str, ModuleShape]


def by_layer(plan: Allocation) -> list[int]:
    """Experts of the first module of each layer."""
    counts = {layer: plan[name].experts for name, layer in reversed(layers_of(plan.modules).items())}
    return [counts[layer] for layer in sorted(counts)]


def options_for(name: str, shapes: Shapes) -> dict[str, Any]:
    """What a strategy cannot do without."""
    wish = Preference({key: 2.0 + len(key) % 5 for key in shapes}, dict.fromkeys(shapes, (9.0, 4.0, 2.0)))
    layers = max(layers_of(shapes).values()) + 1
    needed: dict[str, dict[str, Any]] = {
        "alphalora": {"alphas": [2.0 + layer / 4 for layer in range(layers)]},
        "rules": {"rules": {"query|q_proj": [1, 2, 3], "output.dense|down_proj": 0}, "default": {"rank": 5}},
        "learned": {"preference": wish},
    }
    return needed.get(name, {})


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_meets_a_budget(name: str, shapes: Shapes) -> None:
    options = options_for(name, shapes)
    for experts, rank in [(4, 4), (5, 8), (8, 7)]:
        budget = uniform(shapes, experts, rank).parameters() + 1234
        plan = make(name, shapes, budget=budget, **options)
        assert 0.99 * budget < plan.parameters() <= budget
        assert all(module.top_k <= module.experts for module in plan.adapted().values())
        assert Allocation.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_accepts_the_common_options(name: str, minilm: Shapes) -> None:
    options: dict[str, Any] = {"alpha": 32.0, "scaling": "constant", "top_k": 1, **options_for(name, minilm)}
    budget = uniform(minilm, 4, 8)
    plan = make(name, minilm, budget=budget, router=lambda experts, features: 7, **options)
    assert (plan.alpha, plan.scaling) == (32.0, "constant")
    assert {module.top_k for module in plan.adapted().values()} == {1}
    assert plan.parameters(lambda experts, features: 7) <= budget.parameters(lambda experts, features: 7)
    assert plan.strategy


def test_unknown_strategies_and_options_propose_the_nearest(minilm: Shapes) -> None:
    with pytest.raises(GuilomoError, match=r"Did you mean 'uniform'"):
        make("unifrom", minilm)
    with pytest.raises(GuilomoError, match=r"option of strategy 'mola'.*Did you mean 'budget'"):
        make("mola", minilm, budgets=1000)
    with pytest.raises(GuilomoError, match=r"option 'rules' of strategy 'rules'.*Give rules="):
        make("rules", minilm)
    assert strategy_options("lora").keys() >= {"rank", "budget", "alpha"}


def test_lora_has_one_expert_and_no_router(minilm: Shapes) -> None:
    plan = lora(minilm, rank=8)
    assert plan.parameters() == 8 * sum(sum(shape) for shape in minilm.values())
    assert {(module.experts, module.top_k) for module in plan.modules.values()} == {(1, 1)}
    with pytest.raises(GuilomoError, match=r"top_k = 2 .*uniform"):
        lora(minilm, top_k=2)


def test_fewer_experts_than_top_k_are_refused_not_changed(minilm: Shapes) -> None:
    with pytest.raises(GuilomoError, match=r"experts = 1 .*top_k = 2.*top_k_floor=False"):
        uniform(minilm, experts=1)
    with pytest.raises(GuilomoError, match="groups = 1 "):
        mola(minilm, groups=[1, 4])
    plan = uniform(minilm, experts=1, top_k_floor=False)
    assert {module.top_k for module in plan.modules.values()} == {1}


def test_mola_shapes_on_32_layers(llama: Shapes) -> None:
    assert by_layer(mola(llama)) == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert by_layer(mola(llama, "triangle")) == by_layer(mola(llama, "8-6-4-2"))
    assert mola(llama, groups=[8, 2, 2, 8]).modules == mola(llama, "hourglass").modules
    for shape in ("triangle", "inverted_triangle", "hourglass", "diamond", "rectangle"):
        assert mola(llama, shape).parameters() == 105_635_840


def test_mola_takes_any_number_of_groups_and_layers(minilm: Shapes) -> None:
    assert by_layer(mola(minilm, "hourglass")) == [8, 8, 2, 2, 8, 8]
    assert by_layer(mola(minilm, groups=[0, 3])) == [0, 0, 0, 3, 3, 3]
    assert by_layer(mola(minilm, groups=[2, 4, 6, 8, 10, 12, 2, 4, 6, 8, 10, 12])) == [3, 7, 11, 3, 7, 11]
    with pytest.raises(GuilomoError, match=r"Did you mean 'diamond'"):
        mola(minilm, "diamnod")
    with pytest.raises(GuilomoError, match="at least one expert count"):
        mola(minilm, groups=[])
    with pytest.raises(GuilomoError, match="groups = -2 "):
        mola(minilm, groups=[4, -2])


@pytest.mark.parametrize("layers", range(1, 40))
def test_blocks_are_nearly_equal_and_mirrored(layers: int) -> None:
    for blocks in range(1, layers + 1):
        found = spread_groups(range(blocks), layers)
        sizes = [found.count(block) for block in range(blocks)]
        assert sum(sizes) == layers
        assert found == sorted(found)
        assert max(sizes) - min(sizes) <= 1 + blocks % 2
        if blocks % 2 or layers % 2 == 0:
            assert sizes == sizes[::-1]


def test_resampling_to_fewer_layers_keeps_the_mean() -> None:
    assert spread_groups([2, 4, 6, 8], 2) == [3, 7]
    assert spread_groups([2, 4, 6, 8], 1) == [5]
    assert spread_groups([4, 8, 4], 2) == [5, 5]


def test_normal_is_the_published_bell_on_32_layers(llama: Shapes) -> None:
    rising = [2, 2, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7, 8, 8, 8, 8]
    assert by_layer(normal(llama)) == rising + rising[::-1]


def test_normal_on_other_depths_keeps_the_mean(minilm: Shapes) -> None:
    assert by_layer(normal(minilm)) == [2, 5, 8, 8, 5, 2]
    assert sum(by_layer(normal(minilm, mean_experts=8))) == 48
    assert min(by_layer(normal(minilm, mean_experts=2))) == 2
    with pytest.raises(GuilomoError, match="mean_experts = 0"):
        normal(minilm, mean_experts=0)


def test_hilo_ranks_rise_linearly(minilm: Shapes) -> None:
    assert rank_ramp(6, 2, 16) == [2, 5, 8, 10, 13, 16]
    assert rank_ramp(6, 2, 16, "decreasing") == [16, 13, 10, 8, 5, 2]
    assert rank_ramp(3, 4, 8, "uniform") == [6, 6, 6]
    assert rank_ramp(1, 2, 16) == [2]
    plan = hilo(minilm)
    assert plan["encoder.layer.5.output.dense"].ranks == (16,) * 8
    expected = sum(
        module.experts * (module.ranks[0] * (module.in_features + module.out_features) + module.in_features)
        for module in plan.modules.values()
    )
    assert plan.parameters() == expected


def test_a_constant_hilo_is_mola_and_uniform(llama: Shapes) -> None:
    constant = hilo(llama, experts=5, min_rank=8, max_rank=8)
    assert constant.modules == mola(llama, "rectangle", rank=8).modules == uniform(llama, 5, 8).modules


def test_hilo_refuses_what_is_no_ramp(minilm: Shapes) -> None:
    with pytest.raises(GuilomoError, match=r"Did you mean 'increasing'"):
        hilo(minilm, ramp="incresing")
    with pytest.raises(GuilomoError, match=r"min_rank = 9 .*at most max_rank = 4"):
        hilo(minilm, min_rank=9, max_rank=4)


def test_random_plans_follow_the_seed_and_not_the_order(minilm: Shapes) -> None:
    budget = uniform(minilm, 4, 4)
    plans = [random_plan(minilm, budget, seed) for seed in range(5)]
    assert all(plans[i].modules != plans[j].modules for i in range(len(plans)) for j in range(len(plans)) if i != j)
    turned = dict(reversed(minilm.items()))
    assert random_plan(turned, budget, 3).modules == plans[3].modules
    assert all(plan.parameters() > 0.99 * budget.parameters() for plan in plans)
    with pytest.raises(GuilomoError, match="seed = 'a'"):
        random_plan(minilm, budget, "a")  # type: ignore[arg-type]


def test_random_plans_stay_within_their_caps(minilm: Shapes) -> None:
    for seed in range(10):
        plan = random_plan(minilm, uniform(minilm, 5, 4), seed, max_experts=6, max_rank=5)
        counts = [module.experts for module in plan.modules.values()]
        assert (min(counts), max(counts)) == (2, 6)
        assert max(max(module.ranks) for module in plan.modules.values()) <= 5


def test_random_plans_may_leave_modules_out(minilm: Shapes) -> None:
    plans = [random_plan(minilm, 60_000, seed, min_experts=0, max_experts=1, max_rank=6, top_k=1) for seed in range(40)]
    everywhere = uniform(minilm, 1, 1, top_k=1).parameters()
    assert all(0.97 * 60_000 < plan.parameters() <= 60_000 < 1.5 * everywhere for plan in plans)
    adapted = [len(plan.adapted()) for plan in plans]
    assert 0.3 < sum(adapted) / (40 * len(minilm)) < 0.7
    assert max(plan[name].rank for plan in plans for name in minilm) > 1
    # Whatever the seed, no module is favoured.
    often = [sum(plan[name].adapted for plan in plans) for name in minilm]
    assert min(often) >= 8
    assert max(often) <= 34


@pytest.mark.parametrize("budget", [800, 3_000, 20_000])
def test_random_plans_below_one_rank_per_module(minilm: Shapes, budget: int) -> None:
    """Some modules must go, which ones is left to chance, and the rest spends the budget."""
    space: dict[str, Any] = {"min_experts": 0, "max_experts": 3, "max_rank": 6, "top_k_floor": False}
    plans = [random_plan(minilm, budget, seed, **space) for seed in range(20)]
    assert all(0 < plan.parameters(no_router) <= plan.parameters() <= budget for plan in plans)
    assert min(plan.parameters() for plan in plans) > budget - 2_304  # a row of the largest module is left at most
    chosen = {frozenset(plan.adapted()) for plan in plans}
    assert len(chosen) > 5
    turned = dict(reversed(minilm.items()))
    assert random_plan(turned, budget, 7, **space).modules == plans[7].modules


def test_random_plans_adapt_something_even_where_nothing_was_drawn() -> None:
    shapes = {"a": ModuleShape(8, 8), "b": ModuleShape(8, 40)}
    plans = [random_plan(shapes, 20, seed, min_experts=0, max_experts=1, max_rank=4, top_k=1) for seed in range(40)]
    assert all(list(plan.adapted()) == ["a"] and plan["a"].rank == 1 for plan in plans)


def test_random_plans_refuse_what_cannot_be(minilm: Shapes) -> None:
    with pytest.raises(GuilomoError, match=r"budget = 100 .*at least \d+, the cheapest module at rank 1"):
        random_plan(minilm, 100, min_experts=0)
    with pytest.raises(GuilomoError, match=r"min_experts = 9 .*from 0 to max_experts = 8"):
        random_plan(minilm, 9_000, min_experts=9)


def test_a_shuffled_plan_has_the_same_experts_in_other_places(minilm: Shapes) -> None:
    plan = random_plan(minilm, 60_000, 3, min_experts=0, max_experts=3, max_rank=6)
    others = [shuffled(plan, seed) for seed in range(10)]
    for other in others:
        assert other.parameters() == plan.parameters()
        assert other.shapes() == plan.shapes()
        assert sorted(m.ranks for m in other.modules.values()) == sorted(m.ranks for m in plan.modules.values())
        assert list(other.modules) == list(plan.modules)
    assert len({str(other.modules) for other in others}) == 10
    assert shuffled(plan, 4).modules == others[4].modules
    turned = Allocation(dict(reversed(list(plan.modules.items()))), plan.scaling, plan.alpha)
    assert shuffled(turned, 4).modules == others[4].modules
    with pytest.raises(GuilomoError, match=r"seed = 1\.5"):
        shuffled(plan, 1.5)  # type: ignore[arg-type]


def test_learned_is_fit(minilm: Shapes) -> None:
    wish = Preference(dict.fromkeys(minilm, 3.7), dict.fromkeys(minilm, (6.0, 2.0)))
    plan = make("learned", minilm, preference=wish, budget=300_000, max_rank=8)
    assert plan.modules == fit(wish, minilm, budget=300_000, max_rank=8).modules
    assert plan.strategy == "learned"


def test_a_model_without_modules_is_an_error() -> None:
    for name in ("uniform", "lora", "mola", "normal", "hilo", "random"):
        with pytest.raises(GuilomoError, match=r"shapes = {} .*target names"):
            make(name, {})
