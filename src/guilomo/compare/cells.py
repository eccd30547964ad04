"""Cells of a comparison: what there is to do, what each waits for, and how far it is, which its files alone say.

tasks/TASK/methods/METHOD/seed-S/result.json    done
tasks/TASK/methods/METHOD/seed-S/error.json     failed: what was raised, and where
tasks/TASK/search/search.json, error.json       the same for a search
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import product
from pathlib import Path

from guilomo.compare.config import CompareConfig
from guilomo.run.config import MethodConfig, RunConfig
from guilomo.run.files import read_json
from guilomo.run.methods import FROM_SEARCH
from guilomo.run.searches import search_folder, search_seeds


class State(Enum):
    """How far a cell is."""

    DONE = "done"
    FAILED = "failed"
    BLOCKED = "blocked"  # it waits for one that failed
    WAITING = "waiting"
    READY = "ready"

    @property
    def settled(self) -> bool:
        """Nothing more will happen to it by itself."""
        return self in (State.DONE, State.FAILED, State.BLOCKED)


@dataclass(frozen=True)
class Cell:
    """One thing to do: the training of a method on a task with a seed, or, without a method, a task's search."""

    task: str
    method: str | None
    seed: int

    @property
    def key(self) -> str:
        """How the queue and messages call it."""
        return f"{self.task}/{self.method or ''}/{self.seed}"

    @classmethod
    def of(cls, key: str) -> Cell:
        """The cell that a key names."""
        task, _, rest = key.partition("/")
        method, _, seed = rest.rpartition("/")
        return cls(task, method or None, int(seed))

    def __str__(self) -> str:
        return f"{self.task}: {self.method or 'search'} seed {self.seed}"


class Board:
    """The cells of a comparison and their states."""

    def __init__(self, config: CompareConfig) -> None:
        self.config = config
        self.runs: dict[str, RunConfig] = {task.name: config.run_config(task) for task in config.tasks}
        self._methods = {method.name: method for method in config.methods}

    @cached_property
    def cells(self) -> list[Cell]:
        """All of them, searches first; then seed by seed, so that what there is after a stop is of all tasks."""
        config = self.config
        searched = any(self._searched(method) for method in config.methods)
        seeds = search_seeds(next(iter(self.runs.values()))) if searched else []
        searches = [Cell(task.name, None, seed) for seed, task in product(seeds, config.tasks)]
        trainings = product(config.seeds, config.tasks, config.methods)
        return searches + [Cell(task.name, method.name, seed) for seed, task, method in trainings]

    def method(self, cell: Cell) -> MethodConfig:
        """The method that a cell trains."""
        assert cell.method is not None
        return self._methods[cell.method]

    def folder(self, cell: Cell) -> Path:
        """Where its result and its error lie."""
        run = self.runs[cell.task]
        if cell.method is None:
            return search_folder(run, cell.seed)
        return run.folder / "methods" / cell.method / f"seed-{cell.seed}"

    def result(self, cell: Cell) -> Path:
        return self.folder(cell) / ("search.json" if cell.method is None else "result.json")

    def error(self, cell: Cell) -> Path:
        return self.folder(cell) / "error.json"

    def needs(self, cell: Cell) -> list[tuple[Cell, Path]]:
        """The cells it waits for, and the file that ends the wait: the search's plan, the sweep's choice."""
        if cell.method is None:
            return []
        run, found = self.runs[cell.task], []
        if self._searched(self.method(cell)):
            search = Cell(cell.task, None, cell.seed if run.search_per_seed else run.seeds[0])
            found.append((search, self.result(search)))
        if run.sweep.learning_rates and cell.seed != run.seeds[0]:
            first = Cell(cell.task, cell.method, run.seeds[0])
            found.append((first, run.folder / "methods" / cell.method / "sweep.json"))
        return found

    def state(self, cell: Cell) -> State:
        """How far a cell is."""
        if self.result(cell).exists():
            return State.DONE
        if self.error(cell).exists():
            return State.FAILED
        open_needs = [need for need, file in self.needs(cell) if not file.exists()]
        if any(self.state(need) in (State.FAILED, State.BLOCKED) for need in open_needs):
            return State.BLOCKED
        return State.WAITING if open_needs else State.READY

    def reason(self, cell: Cell) -> str | None:
        """Why a cell that failed or is blocked has no result; None for any other."""
        state = self.state(cell)
        if state is State.FAILED:
            return str(read_json(self.error(cell))["error"])
        if state is not State.BLOCKED:
            return None
        lost = (State.FAILED, State.BLOCKED)
        failed = next(n for n, file in self.needs(cell) if not file.exists() and self.state(n) in lost)
        return f"not run, for {failed} failed: {self.reason(failed)}"

    def open(self) -> list[Cell]:
        """The cells to which something will still happen."""
        return [cell for cell in self.cells if not self.state(cell).settled]

    @staticmethod
    def _searched(method: MethodConfig) -> bool:
        return method.strategy in FROM_SEARCH
