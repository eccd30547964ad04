"""What a strategy wishes, in real numbers, before a budget turns it into integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from guilomo.errors import invalid


@dataclass(frozen=True)
class Preference:
    """Wished expert counts and ranks.

    Attributes:
        experts: module -> wished expert count; 0 or less means "not adapted".
        ranks: module -> wished rank of expert 1, 2, ...; a module that ends up with more experts than listed
            repeats the last one. Needed for adapted modules only.

    Raises:
        GuilomoError: a wish is not a finite number, a rank is not above 0, or an adapted module has no ranks.
    """

    experts: Mapping[str, float]
    ranks: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        for name, wish in self.experts.items():
            if not _finite(wish):
                raise invalid(f"wished experts of module {name!r}", wish, "a finite number")
            if wish > 0 and not self.ranks.get(name):
                remedy = "Give at least one, or 0 experts to leave the module unadapted."
                raise invalid(f"wished ranks of module {name!r}", self.ranks.get(name), "a rank per expert", remedy)
        for name, ranks in self.ranks.items():
            for rank in ranks:
                if not _finite(rank) or rank <= 0:
                    raise invalid(f"wished rank of module {name!r}", rank, "a finite number above 0")
        object.__setattr__(self, "experts", {name: float(wish) for name, wish in self.experts.items()})
        object.__setattr__(self, "ranks", {name: tuple(map(float, ranks)) for name, ranks in self.ranks.items()})

    def rank_of(self, module: str, expert: int) -> float:
        """The wished rank of the 0-based expert."""
        ranks = self.ranks[module]
        return ranks[min(expert, len(ranks) - 1)]


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
