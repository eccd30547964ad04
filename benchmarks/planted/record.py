"""The result file: written whole after every cell, and read back by a run that continues."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.planted.summary import Cell, summarise
from guilomo import __version__
from guilomo.errors import GuilomoError
from guilomo.files import replacing
from guilomo.run.environment import hardware, now, versions

SCHEMA = 1


def all_versions() -> dict[str, str]:
    """Versions of the packages that shape the numbers, this one included."""
    return {"guilomo": __version__, **versions()}


@dataclass
class Record:
    """The cells so far, in the order of worlds and seeds."""

    command: str
    worlds: list[str]
    seeds: list[int]
    cells: list[Cell] = field(default_factory=list)

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.cells.sort(key=lambda c: (self.worlds.index(c["world"]), c["seed"]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with a summary of every world that has cells."""
        by_world = {name: [cell for cell in self.cells if cell["world"] == name] for name in self.worlds}
        return {
            "schema": SCHEMA,
            "command": self.command,
            "made": now(),
            "versions": all_versions(),
            "hardware": hardware(),
            "seeds": self.seeds,
            "summary": {name: summarise(cells) for name, cells in by_world.items() if cells},
            "cells": self.cells,
        }

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        with replacing(path, len(text)) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def cells_in(path: Path) -> list[Cell]:
    """The cells of a result file; none if it does not exist or was made with other versions.

    Raises:
        GuilomoError: it is no result file of this benchmark.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        cells: list[Cell] = found["cells"] if found["schema"] == SCHEMA else []
        return cells if found["versions"] == all_versions() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuilomoError(
            f"{path} cannot be continued ({error!r}): expected a result file of this benchmark. Give another --output "
            "or start anew without --resume, which replaces the file."
        ) from error
