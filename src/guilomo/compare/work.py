"""Doing one cell: what it makes lies in its task's run folder, and a failure is written down instead of raised."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import guilomo
from guilomo.compare.cells import Board, Cell, State
from guilomo.run import Run, environment
from guilomo.run.files import write_json
from guilomo.run.pipeline import StageProgress
from guilomo.tasks import Task
from guilomo.training import Interrupted

LAST_LINES = 12
"""Lines of a traceback that an error.json keeps: where it happened."""


@dataclass
class Worker:
    """Does cells, one after the other, in this process.

    Args:
        board: the comparison's cells.
        progress, should_stop: see `guilomo.run.pipeline.Run`.
    """

    board: Board
    progress: StageProgress
    should_stop: Callable[[], bool]
    _jobs: dict[tuple[str, str | None], Run] = field(default_factory=dict)
    _tasks: dict[str, Task] = field(default_factory=dict)

    def do_all(self, report: Callable[[], None]) -> None:
        """Every cell that is not settled, in order; `report` is called after each.

        Raises:
            Interrupted: it was asked to stop.
        """
        for cell in self.board.cells:
            # A cell comes after those that it waits for, so that one pass is enough.
            if self.board.state(cell) is State.READY:
                self.do(cell)
                report()

    def do(self, cell: Cell) -> None:
        """One cell; it is done, or has an error.json, when this returns.

        Raises:
            Interrupted: it was asked to stop; what it had done is kept.
        """
        if self.should_stop():
            raise Interrupted("The comparison stopped between two cells.")
        try:
            self._run(cell)
        except Interrupted:
            raise
        except Exception as error:
            write_error(self.board.error(cell), f"{type(error).__name__}: {error}", traceback.format_exc())
        finally:
            # A failed training may live on in its traceback; the next one needs the memory.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _run(self, cell: Cell) -> None:
        job = self.job(cell.task, cell.method)
        write_json(self.board.folder(cell) / "cell.json", _origin(cell, job))
        if cell.method is None:
            job.search(cell.seed)
        else:
            job.train(self.board.method(cell), cell.seed)

    def job(self, task: str, method: str | None) -> Run:
        """The run that trains one method on one task, or searches; what it found out about the model is kept.

        It knows no other methods, so that one that cannot be planned at the budget does not stop the rest.
        """
        if (task, method) not in self._jobs:
            config = self.board.runs[task]
            own = [m for m in config.methods if m.name == method]
            job = Run(
                config.model_copy(update={"methods": own}),
                progress=partial(_with_task, self.progress, task),
                should_stop=self.should_stop,
            )
            if task not in self._tasks:
                self._tasks[task] = job.task
            job.task = self._tasks[task]
            self._jobs[task, method] = job
        return self._jobs[task, method]


def write_error(path: Path, error: str, trace: str = "") -> None:
    """An error.json: what was raised, and the last lines of where."""
    place = trace.strip().splitlines()[-LAST_LINES:]
    write_json(path, {"error": error, "traceback": place, "created": environment.now()})


def _with_task(progress: StageProgress, task: str, stage: str, step: int, steps: int, text: str) -> None:
    progress(f"{task}: {stage}", step, steps, text)


def _origin(cell: Cell, job: Run) -> dict[str, Any]:
    """What a cell's numbers rest on, beside its result.json."""
    return {
        "schema": 1,
        "guilomo": guilomo.__version__,
        "task": cell.task,
        "method": cell.method,
        "seed": cell.seed,
        "data_hash": job.task.data_hash,
        "budget": job.facts["budget"],
        "threads": torch.get_num_threads(),
        "versions": environment.versions(),
        "hardware": environment.hardware(),
        "started": environment.now(),
    }
