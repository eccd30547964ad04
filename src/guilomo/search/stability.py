"""The early stop: an allocation that no longer moves."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from guilomo.allocation import Allocation

STABLE_SHARE = 0.01
"""An allocation that moved less than this share of its rank rows between looks is taken as unchanged."""


@dataclass
class Stability:
    """Remembers the last looks at the allocation.

    Attributes:
        patience: how many looks in a row must show no change; 0 never stops.
        looks: the ranks of all modules at the last ``patience + 1`` looks.
    """

    patience: int
    looks: list[list[list[int]]] = field(default_factory=list)

    def note(self, allocation: Allocation) -> None:
        """Takes one look."""
        self.looks = [*self.looks, [list(m.ranks) for m in allocation.modules.values()]][-(self.patience + 1) :]

    @property
    def reached(self) -> bool:
        """Whether the allocation has been stable for `patience` looks."""
        if not self.patience or len(self.looks) <= self.patience:
            return False
        return all(moved_share(a, b) <= STABLE_SHARE for a, b in pairwise(self.looks))


def moved_share(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of rank rows that differ between two looks."""
    changed = total = 0
    for x, y in zip(a, b, strict=True):
        width = max(len(x), len(y))
        x, y = x + [0] * (width - len(x)), y + [0] * (width - len(y))
        changed += sum(abs(i - j) for i, j in zip(x, y, strict=True))
        total += sum(x)
    return changed / max(total, 1)
