"""Whether other work ran while something was timed."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
WAITED, OTHERS, TICKS = 0.01, 0.02, 2
"""Shares of the elapsed time that are let pass, and clock ticks by which the system's account may be off."""


@dataclass(frozen=True)
class Disturbance:
    """What happened beside the timed work.

    Attributes:
        seconds: elapsed.
        waited: seconds in which a thread of this process was ready but not given a core; None where not known.
        others: seconds of cores used by other processes or taken by the hypervisor; None where not known.
        switches: how often this process was put aside for another.
    """

    seconds: float
    waited: float | None
    others: float | None
    switches: int

    @property
    def clean(self) -> bool:
        """Whether nothing else ran to speak of; without the system's account, whether this process was never put aside.

        The second condition is weaker: a neighbour on another core shares caches and memory unseen.
        """
        if self.waited is None and self.switches:
            return False
        if (self.waited or 0.0) > WAITED * self.seconds:
            return False
        return self.others is None or self.others <= OTHERS * self.seconds + TICKS / _ticks_per_second()

    @property
    def share(self) -> float:
        """How disturbed it was, to choose the least of several."""
        known = (self.waited or 0.0) + (self.others or 0.0)
        return (known or 1e-6 * self.switches) / max(self.seconds, 1e-9)


class Watch:
    """Measures the disturbance from its making to `stop`."""

    def __init__(self) -> None:
        self._began = _readings()

    def stop(self) -> Disturbance:
        began, ended = self._began, _readings()
        seconds, own = ended.wall - began.wall, ended.own - began.own
        waited = None if ended.delay is None or began.delay is None else max(ended.delay - began.delay, 0.0)
        busy = None if ended.busy is None or began.busy is None else ended.busy - began.busy
        others = None if busy is None else max(busy - own, 0.0)
        return Disturbance(seconds, waited, others, ended.switches - began.switches)


@dataclass(frozen=True)
class _Readings:
    wall: float
    own: float
    busy: float | None
    delay: float | None
    switches: int


def _readings() -> _Readings:
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return _Readings(time.perf_counter(), time.process_time(), _busy_seconds(), _delay_seconds(), switches)


def _busy_seconds() -> float | None:
    """Seconds that all cores were busy since boot, time taken by the hypervisor included; in clock ticks."""
    try:
        line = (PROC / "stat").read_text().partition("\n")[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _ticks_per_second()


def _delay_seconds() -> float | None:
    """Seconds that the threads of this process stood in a queue for a core, which Linux counts in nanoseconds."""
    try:
        threads = [(task / "schedstat").read_text() for task in (PROC / "self" / "task").iterdir()]
        return sum(int(thread.split()[1]) for thread in threads) / 1e9
    except (OSError, IndexError):
        return None


def _ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK")
