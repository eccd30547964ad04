from __future__ import annotations

from typing import Any

import pytest

from guilomo.allocation import ModuleShape, rules, uniform
from guilomo.errors import GuilomoError

Shapes = dict[str, ModuleShape]
QUERY = "encoder.layer.0.attention.self.query"


def test_the_first_match_decides(minilm: Shapes) -> None:
    plan = rules(minilm, {"layer.0.attention.self.query": [1, 2, 3], "query": 2, r"attention\..*": {"rank": 4}})
    assert plan[QUERY].ranks == (1, 2, 3)
    assert plan["encoder.layer.1.attention.self.query"].ranks == (8, 8)
    assert plan["encoder.layer.1.attention.output.dense"].ranks == (4,) * 4
    assert not plan["encoder.layer.1.output.dense"].adapted


def test_patterns_match_whole_name_parts(minilm: Shapes) -> None:
    plan = rules(minilm, {"output.dense": 2})
    adapted = {name.split(".", 3)[3] for name in plan.adapted()}
    assert adapted == {"output.dense", "attention.output.dense"}
    with pytest.raises(GuilomoError, match=r"pattern = 'uery'.*The nearest is 'query'"):
        rules(minilm, {"uery": 2})


@pytest.mark.parametrize(
    ("rule", "ranks", "top_k"),
    [
        (3, (8, 8, 8), 2),
        (1, (8,), 1),
        (0, (), 2),
        (None, (), 2),
        ([5], (5,), 1),
        ({"experts": 3, "rank": 2, "top_k": 3}, (2, 2, 2), 3),
        ({"ranks": [1, 9], "top_k": 1}, (1, 9), 1),
        ({"experts": 0}, (), 2),
        ({}, (8, 8, 8, 8), 2),
    ],
)
def test_every_form_of_rule(minilm: Shapes, rule: Any, ranks: tuple[int, ...], top_k: int) -> None:
    module = rules(minilm, {"query": rule}, default=2)[QUERY]
    assert (module.ranks, module.top_k) == (ranks, top_k)


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        ({"expert": 3}, ["'query'", "Did you mean 'experts'"]),
        ({"ranks": [1, 2], "rank": 3}, ["'query'", "either ranks"]),
        ({"experts": 2, "top_k": 3}, ["'query'", "top_k = 3", "expert count, 2"]),
        ({"ranks": [0, 1]}, ["'query'", "rank = 0"]),
        ({"ranks": 8}, ["'query'", "ranks = 8", "one rank per expert"]),
        ({"ranks": "8"}, ["'query'", "ranks = '8'"]),
        (-1, ["'query'", "experts = -1"]),
        (True, ["'query'", "experts = True"]),
        ("all", ["'query'", "experts = 'all'"]),
    ],
)
def test_bad_rules_are_named(minilm: Shapes, rule: Any, parts: list[str]) -> None:
    with pytest.raises(GuilomoError) as error:
        rules(minilm, {"query": rule})
    assert all(part in str(error.value) for part in parts)


def test_a_pattern_that_is_no_expression_is_an_error(minilm: Shapes) -> None:
    with pytest.raises(GuilomoError, match=r"pattern = '\(query'.*regular expression"):
        rules(minilm, {"(query": 2})


def test_a_floor_makes_small_modules_an_error(minilm: Shapes) -> None:
    with pytest.raises(GuilomoError, match="experts = 1 "):
        rules(minilm, {"query": 1}, top_k_floor=True)


def test_rules_under_a_budget_keep_counts_and_proportions(minilm: Shapes) -> None:
    budget = uniform(minilm, 4, 8)
    plan = rules(minilm, {"query": [2, 4], ".*": 3}, budget=budget)
    small, large = plan[QUERY].ranks
    assert large == pytest.approx(2 * small, abs=1)
    assert 0.99 * budget.parameters() < plan.parameters() <= budget.parameters()
