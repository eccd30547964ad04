"""One cell of the benchmark: something measured in all its variants within one process and one stretch of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.clocks import CLOCKS, Work
from benchmarks.speed.timing import interleave


class Absent(Exception):
    """What a cell needs is not here; the message says how to give it."""


Result = dict[str, Any]
"""JSON-ready; ``times`` maps what was timed to a timing, ``counts`` maps variants to counted figures."""


@dataclass(frozen=True)
class Setting:
    """How all cells of a run are measured.

    Attributes:
        rounds: undisturbed rounds wanted per timing. seed: of weights and inputs.
        clock: wall, cpu or events; see `clocks`.
    """

    device: torch.device
    rounds: int
    seed: int
    clock: str

    def time(self, works: Mapping[str, Work], reference: str, rounds: int | None = None) -> dict[str, Any]:
        """The timing of all works, with ratios to the reference."""
        return interleave(works, rounds or self.rounds, CLOCKS[self.clock]).to_dict(reference)

    @property
    def few(self) -> int:
        """Rounds where one sample is a whole step of a model, long enough to even out much by itself."""
        return max(3, round(0.6 * self.rounds)) if self.rounds > 3 else self.rounds

    def to_dict(self) -> dict[str, Any]:
        return {"device": str(self.device), "rounds": self.rounds, "seed": self.seed, "clock": self.clock}


@dataclass(frozen=True)
class Cell:
    """A name such as ``layer/d2048-T1024-8x8-k2-bf16``, whose first part is the kind, and how it is measured."""

    name: str
    measure: Callable[[Setting], Result]

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    def run(self, setting: Setting) -> Result:
        """The result, with name, kind and the seconds it took. A failure is a result too: the others shall go on.

        A cell that cannot be measured here, such as one that needs data, says so in ``absent``.
        """
        started = time.perf_counter()
        try:
            found = self.measure(setting)
        except Absent as reason:
            found = {"error": str(reason), "absent": True}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        head = {"name": self.name, "kind": self.kind, "setting": setting.to_dict()}
        return {**head, **found, "seconds": round(time.perf_counter() - started, 1)}
