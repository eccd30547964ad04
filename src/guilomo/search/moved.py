"""How far a search moved from where it started."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from guilomo.allocation import Allocation
from guilomo.search.config import SearchConfig
from guilomo.search.vectors import SelectionVectors

BARELY = 0.25
"""Mean changes of expected experts and of expected ranks that are both below this leave the plan about as it was."""


@dataclass(frozen=True)
class Moved:
    """Change of the expected counts since the start, and what it did to the plan (ours).

    Attributes:
        experts_mean, experts_max: absolute change of the expected expert count, over modules.
        ranks_mean, ranks_max: absolute change of the expected rank, over the experts of all modules.
        modules: share of the modules whose plan differs from the one that the untouched start gives. The start wishes
            the same for all modules, so that even a tiny movement decides who gets what is left of the budget.
    """

    experts_mean: float
    experts_max: float
    ranks_mean: float
    ranks_max: float
    modules: float

    @classmethod
    @torch.no_grad()
    def between(
        cls, start: SelectionVectors, end: SelectionVectors, start_plan: Allocation, end_plan: Allocation
    ) -> Moved:
        """From the vectors at both ends and their plans at one budget."""
        experts, ranks = ((b - a).abs() for a, b in zip(start.expected(), end.expected(), strict=True))
        share = len(start_plan.diff(end_plan)) / len(end_plan.modules)
        return cls(float(experts.mean()), float(experts.max()), float(ranks.mean()), float(ranks.max()), share)

    @property
    def brief(self) -> str:
        """The means, for a line of progress."""
        return f"moved experts by {self.experts_mean:.2f}, ranks by {self.ranks_mean:.2f} on average"

    def warning(self, config: SearchConfig) -> str | None:
        """What to do about a search that stayed where it started; None if it did not."""
        if self.experts_mean >= BARELY or self.ranks_mean >= BARELY:
            return None
        return (
            f"The search barely moved: on average expert counts changed by {self.experts_mean:.2f} and ranks by "
            f"{self.ranks_mean:.2f}, so its allocation says little. Give it more steps (search.steps, now "
            f"{config.steps}), a higher search.outer_learning_rate (now {config.outer_learning_rate}), or a budget "
            "further from the least and the most that the mixture can use (search.min_experts lowers the least)."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "experts": {"mean": self.experts_mean, "max": self.experts_max},
            "ranks": {"mean": self.ranks_mean, "max": self.ranks_max},
            "modules": self.modules,
        }


def start_of(vectors: SelectionVectors, budget: int) -> SelectionVectors:
    """The untouched vectors of the same search, at the present temperature: hardening alone is no movement."""
    start = copy.deepcopy(vectors)
    start.temperature = vectors.config.temperature
    start.start_at(budget)
    start.temperature = vectors.temperature
    return start
