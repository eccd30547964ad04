"""The queue: every cell is taken once, a dead worker's is given back, and several workers find what one finds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from comparisons import Finished, comparison, finish, job_of, numbers
from guilomo.compare import CompareConfig
from guilomo.compare.alive import is_dead, this_process
from guilomo.compare.cells import Board, Cell, State
from guilomo.compare.queue import ATTEMPTS, Queue, default_storage, without_password
from guilomo.compare.work import Worker
from guilomo.errors import GuilomoError
from guilomo.run.files import read_json, write_json
from guilomo.training import Interrupted
from tiny_runs import write_recipe

pytest.importorskip("optuna", reason="needs optuna (extra 'compare')")

UNSWEPT: dict[str, Any] = {"sweep": {"learning_rates": []}, "methods": ["lora", "uniform"]}


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """2 tasks, 2 methods, 4 seeds; nothing waits for anything, and no file is there but the folder."""
    content = comparison(tmp_path, tmp_path, tmp_path / "out", seeds=[0, 1, 2, 3], **UNSWEPT)
    (tmp_path / "out").mkdir()
    return Board(CompareConfig.model_validate(content))


def queue_of(board: Board, join: bool = True) -> Queue:
    return Queue(board, default_storage(board.config.folder), join)


@pytest.fixture
def queue(board: Board) -> Queue:
    found = queue_of(board, join=False)
    found.fill()
    return found


def worker_of(board: Board, done: list[Cell], stop: bool = False) -> Worker:
    """One that writes an empty result instead of training, or is asked to stop while it does a cell."""

    class Quick(Worker):
        def do(self, cell: Cell) -> None:
            if stop:
                raise Interrupted("asked to stop")
            done.append(cell)
            write_json(self.board.result(cell), {})

    return Quick(board, lambda *_: None, lambda: False)


def age_heartbeats(board: Board) -> None:
    with sqlite3.connect(board.config.folder / "queue.db") as connection:
        connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 day')")


def await_heartbeat(board: Board) -> None:
    """Returns when a heartbeat is new; on a busy machine one may come late."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with sqlite3.connect(board.config.folder / "queue.db") as connection:
            query = "SELECT count(*) FROM trial_heartbeats WHERE heartbeat > datetime('now', '-1 hour')"
            if connection.execute(query).fetchone()[0]:
                return
        time.sleep(0.05)
    raise AssertionError("no heartbeat within a minute")


def test_many_workers_take_every_cell_once(board: Board, queue: Queue) -> None:
    taken: list[Cell] = []

    def take() -> None:
        own = queue_of(board)
        while claim := own.claim():
            taken.append(claim.cell)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 16
    assert set(taken) == set(board.cells)


def test_filling_twice_puts_nothing_in_twice(board: Board, queue: Queue) -> None:
    first = queue.claim()
    queue.fill()
    rest = []
    while claim := queue.claim():
        rest.append(claim.cell)
    assert first is not None
    assert sorted([first.cell, *rest], key=str) == sorted(board.cells, key=str)


def test_cells_that_wait_are_not_given_out(tmp_path: Path) -> None:
    content = comparison(tmp_path, tmp_path, tmp_path / "out", methods=["lora"], tasks=[{"name": "a"}])
    board = Board(CompareConfig.model_validate(content))
    (tmp_path / "out").mkdir()
    queue = queue_of(board, join=False)
    queue.fill()
    first = queue.claim()
    assert first is not None
    assert first.cell == Cell("a", "lora", 3)
    assert queue.claim() is None
    write_json(board.runs["a"].folder / "methods" / "lora" / "sweep.json", {})
    second = queue.claim()
    assert second is not None
    assert second.cell == Cell("a", "lora", 1)


def test_work_ends_when_all_is_settled(board: Board, queue: Queue) -> None:
    write_json(board.error(board.cells[3]), {"error": "no luck"})
    done: list[Cell] = []
    queue.work(worker_of(board, done))
    assert done == [cell for cell in board.cells if cell != board.cells[3]]


def test_a_worker_that_is_stopped_gives_its_cell_back(board: Board, queue: Queue) -> None:
    with pytest.raises(Interrupted):
        queue.work(worker_of(board, [], stop=True))
    done: list[Cell] = []
    queue_of(board).work(worker_of(board, done))
    assert set(done) == set(board.cells)


def test_a_dead_workers_cell_is_given_back_until_it_has_killed_too_many(board: Board, queue: Queue) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        taken = []
        while claim := queue.claim():
            taken.append(claim)
        assert {claim.cell for claim in taken} == set(board.cells)
        assert {claim.attempt for claim in taken} == {attempt}
        age_heartbeats(board)
    assert queue.claim() is None
    assert {board.state(cell) for cell in board.cells} == {State.FAILED}
    assert "memory" in str(board.reason(board.cells[0]))


def test_a_worker_that_lives_keeps_its_cell(board: Board) -> None:
    queue = Queue(board, default_storage(board.config.folder), beat=1)
    queue.fill()

    class Slow(Worker):
        def do(self, cell: Cell) -> None:
            age_heartbeats(board)
            await_heartbeat(board)
            other = queue_of(board)
            assert cell not in [claim.cell for _ in board.cells if (claim := other.claim())]
            raise Interrupted("enough")

    with pytest.raises(Interrupted, match="enough"):
        queue.work(Slow(board, lambda *_: None, lambda: False))


def test_a_process_that_ended_here_is_not_waited_for(board: Board, queue: Queue) -> None:
    place = this_process().rpartition(" ")[0]
    if not place:
        pytest.skip("this system does not tell which processes it has")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lost = queue.claim()
    assert lost is not None
    assert not is_dead(f"elsewhere {ended.pid}")
    assert not is_dead(this_process())
    with sqlite3.connect(board.config.folder / "queue.db") as connection:
        ended_process = json.dumps(f"{place} {ended.pid}")
        connection.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = 'process'", [ended_process])
    other = queue_of(board)
    taken = [claim for _ in board.cells if (claim := other.claim())]
    assert [claim.attempt for claim in taken if claim.cell == lost.cell] == [2]


def test_joining_needs_a_comparison(board: Board) -> None:
    with pytest.raises(GuilomoError, match="Start it there first"):
        queue_of(board)


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////nowhere/at/all/queue.db", "oracle+no://u:secret@h/db"])
def test_an_unusable_storage_is_explained(board: Board, url: str) -> None:
    with pytest.raises(GuilomoError, match=r"--storage .* cannot be used") as caught:
        Queue(board, url)
    assert "secret" not in str(caught.value)


def test_without_optuna_the_remedy_is_named(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(GuilomoError, match=r"guilomo\[compare\]"):
        queue_of(board)


def test_passwords_are_left_out() -> None:
    text = "guilomo compare a.yaml --storage postgresql://me:se:cret@host/db --workers 2"
    assert without_password(text) == "guilomo compare a.yaml --storage postgresql://me:***@host/db --workers 2"
    assert without_password("sqlite:///queue.db") == "sqlite:///queue.db"


def test_another_machine_can_do_the_cells(bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    """Here in one process: what was started is done by one that joins, and put together by the first."""
    options = {**UNSWEPT, "methods": ["lora"], "seeds": [0]}
    content = comparison(bert_folder, colours, tmp_path / "out", measure_costs=False, **options)
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    first, second = job_of(content), job_of(content)
    with pytest.raises(GuilomoError, match=r"config\.json"):
        second.join(1, storage)
    first.prepare(resume=False)
    Queue(first.board, storage).fill()
    second.join(1, storage)
    assert first.board.open() == []
    assert first.run(storage=storage)["status"] == "complete"


def test_one_that_joins_with_other_rows_is_refused(bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    source = shutil.copytree(colours, tmp_path / "data")
    content = comparison(bert_folder, source, tmp_path / "out", **UNSWEPT)
    job, storage = job_of(content), f"sqlite:///{tmp_path / 'shared.db'}"
    job.prepare(resume=False)
    Queue(job.board, storage).fill()
    rows = source / "colours.test.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(GuilomoError, match="have changed since"):
        job_of(content).join(1, storage)
    assert len(job.board.open()) == 8


@pytest.mark.slow
def test_two_workers_find_what_one_finds(finished: Finished, bert_folder: Path, colours: Path, tmp_path: Path) -> None:
    content = comparison(bert_folder, colours, tmp_path / "out", measure_costs=False)
    results = numbers(finish(content, workers=2).results)
    assert results == {**numbers(finished.results), "config": results["config"]}


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(
    finished: Finished, bert_folder: Path, colours: Path, tmp_path: Path
) -> None:
    """The whole command is killed with its workers in the middle of a training, and continued."""
    content = comparison(bert_folder, colours, tmp_path / "out", measure_costs=False)
    command = [sys.executable, "-m", "guilomo.cli", "compare", str(write_recipe(tmp_path / "c.yaml", content))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen([*command, "--workers", "2", "--quiet"], env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out").rglob("training.safetensors")) and time.monotonic() < deadline:
        assert job.poll() is None
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    again = subprocess.run([*command, "--resume", "--quiet"], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert numbers(read_json(tmp_path / "out" / "compare.json"))["methods"] == numbers(finished.results)["methods"]
