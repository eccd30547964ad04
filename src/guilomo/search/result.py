"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from guilomo.allocation import Allocation
from guilomo.allocation.preference import Preference
from guilomo.search.config import SearchConfig
from guilomo.search.moved import Moved
from guilomo.search.trajectory import Trajectory


@dataclass
class SearchResult:
    """The searched allocation and how it came about.

    Attributes:
        allocation: the plan, projected onto the budget.
        preference: what the selection vectors wished, before the projection.
        budget: trainable parameters of the mixtures, routers included.
        config: the options used; trajectory: records along the way.
        steps, outer_steps, seconds: what it took; stopped_early: the allocation was stable before the last step.
        estimate: what was foretold before it started (see `guilomo.search.estimate`).
        moved: how far the selection vectors went, see `Moved`.
    """

    allocation: Allocation
    preference: Preference
    budget: int
    config: SearchConfig
    trajectory: Trajectory
    steps: int
    outer_steps: int
    seconds: float
    stopped_early: bool
    estimate: dict[str, float]
    moved: Moved

    def to_dict(self) -> dict[str, Any]:
        """The ``search`` part of results.json."""
        return {
            "relaxation": self.config.relaxation,
            "hypergradient": self.config.hypergradient,
            "steps": self.steps,
            "outer_steps": self.outer_steps,
            "seconds": round(self.seconds, 2),
            "stopped_early": self.stopped_early,
            "estimate": self.estimate,
            "moved": {**self.moved.to_dict(), "warning": self.moved.warning(self.config)},
            "trajectory": self.trajectory.to_dict(list(self.preference.experts)),
        }
