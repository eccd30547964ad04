"""Whether a process of this machine still runs, without waiting for its heartbeat."""

from __future__ import annotations

import os
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")


def this_process() -> str:
    """This process as other processes may ask for it: the machine since it was started, its process table, the number.

    Containers of one machine have process tables of their own. Empty where the system does not tell.
    """
    place = _place()
    return f"{place} {os.getpid()}" if place else ""


def is_dead(process: str) -> bool:
    """Whether a process that `this_process` named has ended for certain: it is of this machine, and not there."""
    place, _, number = process.rpartition(" ")
    if not place or place != _place():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _place() -> str:
    try:
        return f"{BOOT.read_text().strip()} {os.readlink(PROCESSES)}"
    except OSError:
        return ""
