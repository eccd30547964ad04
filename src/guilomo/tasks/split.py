"""Seeded subsets: held-out rows, test rows where the source has none, and caps on sizes."""

from __future__ import annotations

import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeVar

from ..errors import GuilomoError, invalid
from .schema import Example

Row = TypeVar("Row")


def take(rows: Sequence[Row], count: int, seed: int, strata: Sequence[Hashable]) -> tuple[list[Row], list[Row]]:
    """Splits rows into a random part of `count` rows and the rest; both keep the order of `rows`.

    Every stratum gives its proportional share, rounded by largest remainder, so that class frequencies are
    the same in both parts up to one row. The same rows, seed and strata always give the same parts.

    Args:
        rows: what to split.
        count: size of the first part, from 0 to len(rows).
        seed: seed of the permutation.
        strata: one key per row (the class), all equal for a plain random split.

    Raises:
        GuilomoError: `count` is out of range.
    """
    if not 0 <= count <= len(rows):
        raise invalid("number of rows to take", count, f"0 to {len(rows)}, the number of rows")
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(strata):
        groups[key].append(index)
    generator = random.Random(seed)
    chosen: set[int] = set()
    for key, share in zip(groups, _shares([len(group) for group in groups.values()], count), strict=True):
        chosen.update(generator.sample(groups[key], share))
    first = [row for index, row in enumerate(rows) if index in chosen]
    return first, [row for index, row in enumerate(rows) if index not in chosen]


def _shares(sizes: list[int], count: int) -> list[int]:
    total = sum(sizes)
    shares = [size * count // total for size in sizes] if total else []
    by_remainder = sorted(range(len(sizes)), key=lambda i: (-(sizes[i] * count % total), i))
    for index in by_remainder[: count - sum(shares)]:
        shares[index] += 1
    return shares


def strata_of(examples: Sequence[Example], kind: str) -> list[Hashable]:
    """The class of each row for classification, one common key otherwise."""
    return [example.label if kind == "classification" else None for example in examples]


def fraction_count(total: int, fraction: float, what: str, remedy: str = "Add rows.") -> int:
    """`round(total * fraction)`, but at least 1 on both sides where the fraction is above 0.

    Raises:
        GuilomoError: there are too few rows to give something to both sides.
    """
    if fraction == 0.0:
        return 0
    if total < 2:
        raise GuilomoError(
            f"{total} row(s) cannot be divided into {what} and the rest: expected at least 2 rows. {remedy}"
        )
    return min(max(1, round(total * fraction)), total - 1)


def check_splits(splits: dict[str, list[Example]]) -> None:
    """Warns of ids that occur twice and of inputs that occur in two splits: both make measurements too
    good.
    """
    ids = Counter(example.id for rows in splits.values() for example in rows)
    twice = [name for name, count in ids.items() if count > 1]
    if twice:
        warnings.warn(
            f"{len(twice)} example ids occur more than once, e.g. {twice[0]!r}: results are paired by id, "
            "and the same row in train and test makes scores too good. Give each row its own id.",
            stacklevel=2,
        )
    seen = {_content(example) for name in ("train", "held_out") for example in splits[name]}
    leaked = [example.id for example in splits["test"] if _content(example) in seen]
    if leaked:
        warnings.warn(
            f"{len(leaked)} test rows have the same text as a training row, e.g. id {leaked[0]!r}: scores "
            "will be too good. Remove them from the training rows.",
            stacklevel=2,
        )


def _content(example: Example) -> tuple[str, tuple[str, ...] | None]:
    return example.full_input, example.choices
