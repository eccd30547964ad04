"""The queue that several workers take cells from, on Optuna's storage: a cell is a trial that waits.

Whether a cell is done is said by its files alone; the queue only says who does what now. A worker that dies stops
sending its heartbeat, and its cell is given back.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from guilomo.compare.alive import is_dead, this_process
from guilomo.compare.cells import Board, Cell, State
from guilomo.compare.work import Worker, write_error
from guilomo.errors import GuilomoError
from guilomo.training import Interrupted

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

BEAT = 20
"""Seconds between heartbeats; after three that did not come, a cell is given back."""
POLL = 0.5
"""Seconds between looks into a queue in which nothing can be taken now."""
ATTEMPTS = 3
"""After so many workers that died with it, a cell has failed."""
LOCK_SECONDS = 600


class Claim(NamedTuple):
    """A cell that this worker has taken, and its trial's number and id in the storage."""

    cell: Cell
    number: int
    trial: int
    attempt: int


class Queue:
    """The cells of one comparison in a shared storage.

    Args:
        board: the cells.
        url: a database that SQLAlchemy knows, such as ``sqlite:///FILE`` or ``postgresql://HOST/NAME``.
        join: the comparison must be there already.
        beat: seconds between heartbeats.

    Raises:
        GuilomoError: Optuna is missing, the storage cannot be reached, or `join` and the comparison is not there.
    """

    def __init__(self, board: Board, url: str, join: bool = False, beat: int = BEAT) -> None:
        self._board, self._beat = board, beat
        self._optuna = _optuna()
        self._lock = board.config.folder / "queue.lock" if url.startswith("sqlite") else None
        options: dict[str, Any] = {"connect_args": {"timeout": LOCK_SECONDS}} if self._lock else {}
        name = study_name(board)
        with _explained(url), _no_experimental_warning():
            self._storage = self._optuna.storages.RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=beat,
                grace_period=3 * beat,
                heartbeat_stale_trial_callback=self._after_a_death,
            )
            known = {study.study_name for study in self._storage.get_all_studies()}
            if join and name not in known:
                raise GuilomoError(
                    f"--storage {without_password(url)} holds no comparison of this file. Start it there first, with "
                    "the same file and without --join."
                )
            self._study = self._optuna.create_study(study_name=name, storage=self._storage, load_if_exists=True)

    def fill(self) -> None:
        """Puts the open cells that are not there yet into the queue."""
        states = self._optuna.trial.TrialState
        with self._alone():
            active = self._study.get_trials(deepcopy=False, states=(states.WAITING, states.RUNNING))
            there = {trial.user_attrs["cell"] for trial in active}
            for cell in self._board.open():
                if cell.key not in there:
                    self._put(self._study, cell.key, attempt=1)

    def work(self, worker: Worker) -> None:
        """Takes cells and does them until all of the comparison are settled, whoever settles them.

        Raises:
            Interrupted: the worker was asked to stop; its cell is given back.
        """
        while self._board.open():
            if worker.should_stop():
                raise Interrupted("The comparison stopped.")
            claim = self.claim()
            if claim is None:
                time.sleep(POLL)
                continue
            try:
                with self._beating(claim):
                    worker.do(claim.cell)
            except BaseException:
                self._give_back(claim)
                raise
            self._finish(claim)

    def claim(self) -> Claim | None:
        """Takes a cell that can be done now; None if there is none."""
        states = self._optuna.trial.TrialState
        with self._alone():
            self._bury()
            for trial in self._study.get_trials(deepcopy=False, states=(states.WAITING,)):
                cell = Cell.of(trial.user_attrs["cell"])
                state = self._board.state(cell)
                if state in (State.WAITING, State.BLOCKED) or not self._take(trial):
                    continue
                claim = Claim(cell, trial.number, trial._trial_id, trial.user_attrs["attempt"])
                if state is State.READY:
                    return claim
                self._finish(claim)
        return None

    def _bury(self) -> None:
        """Gives back the cells of workers that died: on this machine at once, elsewhere when heartbeats are missed."""
        states = self._optuna.trial.TrialState
        with _no_experimental_warning():
            self._optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            if not is_dead(trial.user_attrs.get("process", "")):
                continue
            try:
                self._storage.set_trial_state_values(trial._trial_id, states.FAIL)
            except RuntimeError:  # another worker was faster
                continue
            self._after_a_death(self._study, trial)

    def _take(self, trial: FrozenTrial) -> bool:
        """Whether this worker is the one that gets a waiting trial."""
        # Without a first heartbeat, a worker that dies now would never be missed.
        self._storage.record_heartbeat(trial._trial_id)
        try:
            won = self._storage.set_trial_state_values(trial._trial_id, self._optuna.trial.TrialState.RUNNING)
        except RuntimeError:  # another worker has finished it meanwhile
            return False
        if won:
            self._storage.set_trial_user_attr(trial._trial_id, "process", this_process())
        return bool(won)

    def _finish(self, claim: Claim) -> None:
        # Another worker may have called this one dead and told the trial failed.
        self._study.tell(claim.number, 0.0, skip_if_finished=True)

    def _give_back(self, claim: Claim) -> None:
        with self._alone():
            self._study.tell(claim.number, state=self._optuna.trial.TrialState.FAIL, skip_if_finished=True)
            self._put(self._study, claim.cell.key, claim.attempt)

    def _after_a_death(self, study: Study, trial: FrozenTrial) -> None:
        """Gives the cell of a worker that died to another, unless several died with it."""
        cell, attempt = Cell.of(trial.user_attrs["cell"]), trial.user_attrs["attempt"]
        if self._board.state(cell).settled:
            return
        if attempt < ATTEMPTS:
            self._put(study, cell.key, attempt + 1)
        else:
            reason = f"The processes that did it ended without a word, {ATTEMPTS} of them; was there enough memory?"
            write_error(self._board.error(cell), reason)

    @staticmethod
    def _put(study: Study, key: str, attempt: int) -> None:
        study.enqueue_trial({}, user_attrs={"cell": key, "attempt": attempt})

    @contextmanager
    def _beating(self, claim: Claim) -> Iterator[None]:
        """Sends heartbeats from a thread while the block runs."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self._beat):
                try:
                    self._storage.record_heartbeat(claim.trial)
                except Exception as error:
                    # One that is lost is no reason to lose a training; several are noticed by the others.
                    warnings.warn(f"A heartbeat could not be written: {error}", stacklevel=1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one worker at a time where the database locks no rows: SQLite would let two take the same trial.

        The lock is a transaction on a file beside it, which ends with the process in any case.
        """
        if self._lock is None:
            yield
            return
        connection = sqlite3.connect(self._lock, timeout=LOCK_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            yield
        finally:
            connection.close()


def default_storage(folder: Path) -> str:
    """The database in the output folder, for the workers of one machine."""
    return f"sqlite:///{(folder / 'queue.db').absolute()}"


def study_name(board: Board) -> str:
    """The same on all machines, wherever they see the output folder."""
    settings = board.config.model_dump(mode="json", exclude={"output"})
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"guilomo compare {board.config.name} {digest[:12]}"


def without_password(text: str) -> str:
    """Text in which passwords of database addresses are left out."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]*@", r"\1:***@", text)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise GuilomoError(
            "Several workers need Optuna, which keeps their queue: pip install 'guilomo[compare]'. With --workers 1 "
            "(and no --storage) it works without."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def _no_experimental_warning() -> Iterator[None]:
    """Optuna calls heartbeats experimental, in every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _optuna().exceptions.ExperimentalWarning)
        yield


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns what SQLAlchemy says of an address or a server into an error that names the option."""
    try:
        yield
    except GuilomoError:
        raise
    except (ImportError, OSError, RuntimeError, ValueError, sqlalchemy_error()) as error:
        reason = without_password((str(error).splitlines() or [type(error).__name__])[0])
        raise GuilomoError(
            f"--storage {without_password(url)} cannot be used: {reason} Expected a database that SQLAlchemy reaches, "
            "such as sqlite:///queue.db or postgresql://USER@HOST/NAME, its driver installed."
        ) from error


def sqlalchemy_error() -> type[Exception]:
    """The class of all errors of the library underneath, which only Optuna brings."""
    from sqlalchemy.exc import SQLAlchemyError

    found: type[Exception] = SQLAlchemyError
    return found
