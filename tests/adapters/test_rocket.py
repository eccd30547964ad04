"""Rocket's choice against its definition, and what must not change it."""

from __future__ import annotations

import math
import random
from itertools import combinations
from pathlib import Path

import pytest
import torch

from bank_tools import MIXED, save_adapter, save_bank
from guilomo import GuilomoError
from guilomo.adapters import LoraAdapter, LoraPair, read_adapter, rocket_choice, similarity

NAMES = [f"a{i}" for i in range(10)]


def _numbers(seed: int) -> tuple[dict[str, float], dict[str, float], dict[frozenset[str], float]]:
    drawn = random.Random(seed)
    accuracy = {name: drawn.randint(0, 6) / 6 for name in NAMES}  # with ties
    perplexity = {name: drawn.uniform(1, 9) for name in NAMES}
    alike = {frozenset(pair): drawn.random() for pair in combinations(NAMES, 2)}
    return accuracy, perplexity, alike


def _naive(accuracy: dict[str, float], perplexity: dict[str, float], alike: dict[frozenset[str], float]) -> set[str]:
    """The definition, in the order of the docstring."""

    def total(name: str) -> int:
        lower = sum(perplexity[other] < perplexity[name] for other in NAMES)
        higher = sum(accuracy[other] > accuracy[name] for other in NAMES)
        return (1 + lower) + (1 + higher)

    pool = sorted(NAMES, key=lambda name: (total(name), perplexity[name]))[:8]
    groups = list(combinations(pool, 4))
    spread = {group: sum(alike[frozenset(pair)] for pair in combinations(group, 2)) for group in groups}
    rank = {group: 1 + sum(value < spread[group] for value in spread.values()) for group in groups}
    return set(min(groups, key=lambda group: (sum(map(total, group)) + rank[group], spread[group])))


@pytest.mark.parametrize("seed", range(20))
def test_the_definition(seed: int) -> None:
    accuracy, perplexity, alike = _numbers(seed)
    choice = rocket_choice(accuracy, perplexity, lambda *pair: alike[frozenset(pair)], 4)
    assert set(choice.chosen) == _naive(accuracy, perplexity, alike)
    assert len(choice.pool) == 8
    assert len(choice.similarities) == 28


@pytest.mark.parametrize("seed", range(5))
def test_order_of_the_bank_and_monotone_transforms_do_not_matter(seed: int) -> None:
    accuracy, perplexity, alike = _numbers(seed)
    wanted = rocket_choice(accuracy, perplexity, lambda *pair: alike[frozenset(pair)], 4)
    backwards = {name: math.exp(accuracy[name]) for name in reversed(NAMES)}
    logs = {name: math.log(perplexity[name]) for name in reversed(NAMES)}
    found = rocket_choice(backwards, logs, lambda *pair: alike[frozenset(pair)], 4)
    assert found == wanted
    assert list(found.rank_sums) != list(wanted.rank_sums)


def test_a_duplicate_is_not_taken_where_another_is_as_good() -> None:
    same = dict.fromkeys("abc", 1.0)
    choice = rocket_choice(same, same, lambda *pair: 1.0 if set(pair) == {"a", "b"} else 0.5, 2)
    assert choice.chosen == ["a", "c"]
    assert set(choice.rank_sums.values()) == {2}


def test_a_model_that_diverged_comes_last() -> None:
    accuracy = {"a": 1.0, "b": 1.0, "c": 1.0}
    for broken in (math.nan, math.inf):
        choice = rocket_choice(accuracy, {"a": broken, "b": 2.0, "c": 3.0}, lambda *pair: 0.0, 2)
        assert choice.chosen == ["b", "c"]


def test_numbers_that_do_not_fit() -> None:
    same = dict.fromkeys(NAMES, 1.0)
    for count, pool, says in (
        (0, 8, "count = 0"),
        (9, 8, "count = 9 .*from 1 to 8"),
        (11, 20, "count = 11 .*from 1 to 10"),
    ):
        with pytest.raises(GuilomoError, match=says):
            rocket_choice(same, same, lambda *pair: 0.0, count, pool)
    many = {str(i): 1.0 for i in range(60)}
    with pytest.raises(GuilomoError, match=r"pool = 60 .*Lower it"):
        rocket_choice(many, many, lambda *pair: 0.0, 6, 60)


def _cosine_of_the_products(one: LoraAdapter, other: LoraAdapter) -> float:
    found = []
    for module in {*one.pairs, *other.pairs}:
        if module not in one.pairs or module not in other.pairs:
            found.append(0.0)
            continue
        first, second = ((p.b @ p.a).flatten() for p in (one.pairs[module], other.pairs[module]))
        found.append(float((first @ second).abs() / (first.norm() * second.norm())))
    return sum(found) / len(found)


def test_similarity_is_the_cosine_of_the_changes(tmp_path: Path) -> None:
    adapters = [read_adapter(folder) for folder in save_bank(tmp_path, MIXED).values()]
    for one, other in combinations(adapters, 2):
        value = similarity(one, other)
        assert 0 < value < 1
        assert value == pytest.approx(_cosine_of_the_products(one, other), rel=1e-10)
        assert value == pytest.approx(similarity(other, one), rel=1e-12)
    assert similarity(adapters[0], adapters[0]) == pytest.approx(1, rel=1e-12)


def test_similarity_does_not_see_how_a_change_is_written(tmp_path: Path) -> None:
    adapter, other = (read_adapter(save_adapter(tmp_path / str(seed), seed=seed, r=4)) for seed in (0, 1))
    mixer = torch.randn(4, 4, dtype=torch.float64)
    pairs = {m: LoraPair(-3 * mixer.inverse() @ p.a, p.b @ mixer, 9.0) for m, p in adapter.pairs.items()}
    rewritten = LoraAdapter("x", adapter.folder, adapter.config, pairs, {})
    assert similarity(rewritten, adapter) == pytest.approx(1, rel=1e-9)
    assert similarity(rewritten, other) == pytest.approx(similarity(adapter, other), rel=1e-9)


def test_a_change_that_is_zero_is_like_nothing(tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(tmp_path / "a"))
    zero = {m: LoraPair(p.a, torch.zeros_like(p.b), 1.0) for m, p in adapter.pairs.items()}
    assert similarity(LoraAdapter("z", adapter.folder, adapter.config, zero, {}), adapter) == 0.0
