"""Rocket's choice of adapters: good on a few labelled examples, and unlike each other (arXiv 2408.15915)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from guilomo.errors import invalid

Key = TypeVar("Key")
MOST_COMBINATIONS = 100_000


@dataclass(frozen=True)
class RocketChoice:
    """What was chosen, and from what.

    Attributes:
        chosen: in the order of the pool. pool: the candidates of the best ranks, best first.
        rank_sums: rank of the perplexity plus that of the accuracy, of every candidate.
        similarities: of every pair in the pool, as ``(one, other, value)``.
    """

    chosen: list[str]
    pool: list[str]
    rank_sums: dict[str, int]
    similarities: list[tuple[str, str, float]]


def rocket_choice(
    accuracy: Mapping[str, float],
    perplexity: Mapping[str, float],
    similarity: Callable[[str, str], float],
    count: int,
    pool: int = 8,
) -> RocketChoice:
    """The `count` adapters with the lowest sum of ranks.

    1. Every candidate has a rank by perplexity (lowest first) plus one by accuracy (highest first).
    2. The `pool` candidates with the lowest sums go on.
    3. Among their combinations of `count`, each has a rank by diversity: the lowest sum of its pairs' similarities is
       first. Chosen is the combination with the lowest sum of the candidates' rank sums plus this rank.

    Equal values share the lower rank. The paper does not say what ties do; here equal sums of candidates are decided by
    the perplexity and then by name, and those of combinations by diversity and then by name, so that the order of the
    bank never matters. The diversity of the paper is one over the mean cosine; its ranks are those of the sum, for
    cosines that are not negative.

    Args:
        accuracy, perplexity: of every candidate.
        similarity: of two candidates, see `guilomo.adapters.similarity`.
        count: how many to choose. pool: how many to choose among.

    Raises:
        GuilomoError: more are asked for than there are, or the pool has too many combinations.
    """
    check_sizes(len(accuracy), count, pool)
    rank_sums = {
        name: by_perplexity + by_accuracy
        for (name, by_perplexity), by_accuracy in zip(
            _ranks(perplexity).items(),
            _ranks({name: -accuracy[name] for name in perplexity}).values(),
            strict=True,
        )
    }
    best = sorted(rank_sums, key=lambda name: (rank_sums[name], _finite(perplexity[name]), name))[:pool]
    pairs = {frozenset(pair): similarity(*sorted(pair)) for pair in combinations(best, 2)}
    sums = {group: _summed(group, pairs) for group in combinations(best, count)}
    diversity = _ranks(sums)
    chosen = min(
        sums, key=lambda group: (sum(rank_sums[n] for n in group) + diversity[group], sums[group], sorted(group))
    )
    similarities = [(*sorted(pair), value) for pair, value in pairs.items()]
    return RocketChoice(list(chosen), best, rank_sums, similarities)  # type: ignore[arg-type]


def check_sizes(candidates: int, count: int, pool: int) -> None:
    """Whether `rocket_choice` can be made; the candidates need not have been scored.

    Raises:
        GuilomoError: see `rocket_choice`.
    """
    available = min(pool, candidates)
    if not 1 <= count <= available:
        raise invalid("count", count, f"from 1 to {available}, the adapters in the pool")
    if math.comb(available, count) > MOST_COMBINATIONS:
        raise invalid("pool", pool, f"one with at most {MOST_COMBINATIONS} combinations of {count}", "Lower it.")


def _ranks(values: Mapping[Key, float]) -> dict[Key, int]:
    """1 for the lowest value; equal values share the lower rank."""
    order = sorted((_finite(value) for value in values.values()), reverse=True)
    first = {value: len(order) - place for place, value in enumerate(order)}
    return {key: first[_finite(value)] for key, value in values.items()}


def _finite(value: float) -> float:
    """A model that diverged comes last."""
    return math.inf if math.isnan(value) else value


def _summed(group: Sequence[str], pairs: Mapping[frozenset[str], float]) -> float:
    # Rounded, so that the order in which equal numbers are added up decides nothing.
    return round(math.fsum(pairs[frozenset(pair)] for pair in combinations(group, 2)), 12)
