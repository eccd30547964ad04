"""Interleaved timing: every round runs each variant once, and rounds in which other work ran are thrown away."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.speed.clocks import Clock, Work
from benchmarks.speed.disturbance import Disturbance, Watch
from benchmarks.speed.spread import ratio

SAMPLE_SECONDS = 5e-3
"""A sample repeats its work until it lasts about this long."""
ATTEMPTS_PER_ROUND = 2
"""After so many rounds per round that is wanted, the least disturbed are taken instead."""


class Watching(Protocol):
    """Looks for other work from its making to `stop`."""

    def stop(self) -> Disturbance: ...


@dataclass(frozen=True)
class Timing:
    """Samples that belong together round by round.

    Attributes:
        samples: seconds of one call, per variant and kept round.
        repeats: calls per sample.
        discarded: rounds thrown away.
        noisy: too few rounds were undisturbed, so that the least disturbed were kept.
        disturbance: the largest share of other work in a kept round, in cores.
    """

    samples: dict[str, list[float]]
    repeats: dict[str, int]
    discarded: int
    noisy: bool
    disturbance: float

    def to_dict(self, reference: str) -> dict[str, Any]:
        """JSON-ready, with the ratio of every variant to the reference."""
        found = {
            "samples": {name: [float(f"{s:.5g}") for s in seconds] for name, seconds in self.samples.items()},
            "repeats": self.repeats,
            "rounds": len(next(iter(self.samples.values()))),
            "discarded": self.discarded,
            "noisy": self.noisy,
            "disturbance": round(self.disturbance, 3),
            "reference": reference,
        }
        return {**found, "ratios": {name: ratio(found, name, reference) for name in self.samples}}


def interleave(
    works: Mapping[str, Work],
    rounds: int,
    clock: Clock,
    watch: Callable[[], Watching] = Watch,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Timing:
    """Times all works round by round until `rounds` rounds were undisturbed, or that was tried often enough."""
    with _no_garbage_collection():
        repeats = {name: _repeats(work, clock, sample_seconds) for name, work in works.items()}
        tried: list[tuple[Disturbance, dict[str, float]]] = []
        clean = 0
        while clean < rounds and len(tried) < ATTEMPTS_PER_ROUND * rounds:
            gc.collect()
            watching = watch()
            seconds = {name: clock(works[name], repeats[name]) for name in _rotated(list(works), len(tried))}
            tried.append((watching.stop(), seconds))
            clean += tried[-1][0].clean
    kept = sorted(tried, key=lambda one: (not one[0].clean, one[0].share))[:rounds]
    return Timing(
        samples={name: [seconds[name] for _, seconds in kept] for name in works},
        repeats=repeats,
        discarded=len(tried) - len(kept),
        noisy=clean < rounds,
        disturbance=max(disturbance.share for disturbance, _ in kept),
    )


def _repeats(work: Work, clock: Clock, sample_seconds: float) -> int:
    """Calls that fill a sample; the first call is not looked at, for it pays for allocations."""
    clock(work, 1)
    return max(1, math.ceil(sample_seconds / max(clock(work, 1), 1e-9)))


def _rotated(names: list[str], by: int) -> list[str]:
    """So that no variant always runs after the same one, or always first."""
    start = by % len(names)
    return names[start:] + names[:start]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collects between rounds only, and then looks at new objects only, which is quick."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
