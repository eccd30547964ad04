"""The result file: written whole after every cell, and read back by a run that continues."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.cells import Result, Setting
from guilomo import __version__
from guilomo.errors import GuilomoError
from guilomo.files import replacing
from guilomo.run.environment import hardware, now, versions

SCHEMA = 1
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Instruction sets that decide how fast products are."""


@dataclass
class Record:
    """The cells so far, in the order in which they run.

    Attributes:
        command: what was typed. order: names of all cells of this run.
    """

    command: str
    order: list[str]
    setting: Setting
    cells: list[Result] = field(default_factory=list)

    def add(self, cell: Result) -> None:
        self.cells.append(cell)
        self.cells.sort(key=lambda c: self.order.index(c["name"]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "command": self.command,
            "made": now(),
            **basis(),
            "setting": self.setting.to_dict(),
            "cells": self.cells,
        }

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        with replacing(path, len(text)) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


@cache
def basis() -> dict[str, Any]:
    """What the numbers rest on: commit, versions, machine."""
    return {
        "commit": _commit(),
        "versions": {"guilomo": __version__, **versions()},
        "hardware": {**hardware(), "threads": torch.get_num_threads(), "flags": _flags(), "mkldnn": _mkldnn()},
    }


def kept_cells(path: Path, setting: Setting) -> list[Result]:
    """The cells of a result file that need not be measured again: same code, versions, machine and setting, no error.

    Raises:
        GuilomoError: it is no result file of this benchmark.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        same = found["schema"] == SCHEMA and found["setting"] == setting.to_dict()
        same = same and all(found[key] == value for key, value in basis().items())
        return [cell for cell in found["cells"] if "error" not in cell] if same else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuilomoError(
            f"{path} cannot be continued ({error!r}): expected a result file of this benchmark. Give another --output "
            "or start anew without --resume, which replaces the file."
        ) from error


def _commit() -> str:
    """The commit, with ``+changes`` if the source differs from it; empty outside a repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/speed")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str:
    # Without this, looking at the state would refresh the index file, under the feet of others.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", *arguments]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _flags() -> list[str]:
    try:
        listing = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    words = set(listing.split())
    return [flag for flag in FLAGS if flag in words]


def _mkldnn() -> bool:
    return bool(torch.backends.mkldnn.is_available())
