"""The comparison from its beginning to compare.json. What is done lies in the output folder and is not done again.

config.json                 the resolved comparison
tasks/TASK/                 one run folder per task, as `guilomo run` makes it, and facts.json, costs.json
tasks/TASK/methods/METHOD/seed-S/cell.json, error.json    what the cell rests on; why it failed
queue.db, queue.lock        who does what, with several workers
compare.json                the result
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from guilomo.compare.cells import Board, Cell
from guilomo.compare.config import CompareConfig
from guilomo.compare.costs import measure_costs
from guilomo.compare.facts import check_data, facts_of
from guilomo.compare.processes import spread
from guilomo.compare.queue import Queue, default_storage
from guilomo.compare.results import comparison_results
from guilomo.compare.work import Worker
from guilomo.errors import invalid
from guilomo.run import Run
from guilomo.run.claim import refuse_changes
from guilomo.run.files import read_json, write_json
from guilomo.run.methods import check_methods
from guilomo.run.pipeline import StageProgress


def _silent(stage: str, step: int, steps: int, text: str) -> None:
    """Progress for callers who want none."""


@dataclass
class Comparison:
    """A comparison of methods on tasks.

    Args:
        config: what to compare.
        command: what the user typed, for the result.
        progress: called with (stage, step, steps, a short text); the stage "cells" counts cells.
        should_stop: asked after every step; when true the step is saved and `Interrupted` raised.

    Raises:
        GuilomoError: a method is unknown, or has options that it cannot have.
    """

    config: CompareConfig
    command: str = ""
    progress: StageProgress = _silent
    should_stop: Callable[[], bool] = field(default=lambda: False)

    def __post_init__(self) -> None:
        for config in self.board.runs.values():
            check_methods(config)

    @cached_property
    def board(self) -> Board:
        return Board(self.config)

    @cached_property
    def worker(self) -> Worker:
        return Worker(self.board, self.progress, self.should_stop)

    def prepare(self, resume: bool, retry_failed: bool = False) -> None:
        """Claims the output folder, and looks at every task's data, model and budget before anything is trained.

        Args:
            resume: continue what the folder holds.
            retry_failed: forget the failures, so that those cells are tried again from their last checkpoints.

        Raises:
            GuilomoError: the folder holds another comparison, or one and `resume` is false; or something of the
                tasks cannot be used.
        """
        self._claim(resume)
        for place, task in enumerate(self.config.tasks, start=1):
            facts_of(self.worker, task.name)
            if any(cell.task == task.name for cell in self.board.open()):
                check_data(self.worker, task.name)
            self.progress("tasks", place, len(self.config.tasks), task.name)
        for config in self.board.runs.values():
            Run(config).prepare(resume=True)
        if retry_failed:
            for cell in self.board.cells:
                self.board.error(cell).unlink(missing_ok=True)

    def _claim(self, resume: bool) -> None:
        path = self.config.folder / "config.json"
        present = self._settings()
        if path.exists() and (self.config.folder / "tasks").exists():
            refuse_changes("comparison", self.config.folder, read_json(path), present, resume)
        write_json(path, present)

    def _settings(self) -> dict[str, Any]:
        """What must agree; other machines may see the folder under another path."""
        return self.config.model_dump(mode="json", exclude={"output"})

    def run(self, workers: int = 1, storage: str | None = None) -> dict[str, Any]:
        """Does every cell, measures costs, and writes compare.json; also where it is stopped, from what is done.

        Args:
            workers: processes on this machine. One, without a storage, needs no queue and no Optuna.
            storage: address of the database with the queue; unset: a file in the output folder.

        Raises:
            Interrupted: it was asked to stop.
            GuilomoError: the queue cannot be used, or the workers died.
        """
        _check_workers(workers)
        try:
            if workers == 1 and storage is None:
                report = self._counter()
                report()
                self.worker.do_all(report)
            elif self.board.open():
                address = storage or default_storage(self.config.folder)
                Queue(self.board, address).fill()
                self._work(workers, address)
        finally:
            self.write_results()
        if self.config.measure_costs:
            measure_costs(self.worker)
        return self.write_results()

    def join(self, workers: int, storage: str) -> None:
        """Does cells of a comparison that was started elsewhere, until all are settled.

        Raises:
            Interrupted: it was asked to stop.
            GuilomoError: the comparison is not there, or its data are others on this machine.
        """
        _check_workers(workers)
        if not (self.config.folder / "config.json").exists():
            raise invalid(
                "output",
                str(self.config.folder),
                "the folder of the comparison that is joined, with its config.json",
                "All machines must see one folder; where its path differs, give it with --set output=...",
            )
        Queue(self.board, storage, join=True)
        for task in self.config.tasks:
            check_data(self.worker, task.name)
        self._work(workers, storage)

    def _work(self, workers: int, storage: str) -> None:
        report = self._counter()
        if workers == 1:
            Queue(self.board, storage, join=True).work(Worker(self.board, self._and_count(report), self.should_stop))
            report()
        else:
            spread(self.board, storage, workers, report, self.should_stop)

    def _and_count(self, report: Callable[[], None]) -> StageProgress:
        """Progress of steps, with that of cells beside it."""

        def progress(stage: str, step: int, steps: int, text: str) -> None:
            self.progress(stage, step, steps, text)
            if step == steps:
                report()

        return progress

    def _counter(self) -> Callable[[], None]:
        """Reports how many of the cells that are open now have been settled since."""
        left: list[Cell] = self.board.open()
        shown = -1

        def report() -> None:
            nonlocal shown
            done = sum(self.board.state(cell).settled for cell in left)
            if left and done != shown:
                shown = done
                self.progress("cells", done, len(left), "")

        return report

    def results(self) -> dict[str, Any]:
        """The content of compare.json, from the cells that are done."""
        return comparison_results(self.board, self.command)

    def write_results(self) -> dict[str, Any]:
        """Writes compare.json."""
        results = self.results()
        write_json(self.results_file, results)
        return results

    @property
    def results_file(self) -> Path:
        return self.config.folder / "compare.json"


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise invalid("--workers", workers, "a number of at least 1")
