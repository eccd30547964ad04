"""Several workers on this machine, one process each, with the cores and the accelerators divided among them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

from guilomo.compare.cells import Board
from guilomo.compare.config import CompareConfig
from guilomo.compare.queue import Queue
from guilomo.compare.work import Worker
from guilomo.errors import GuilomoError
from guilomo.training import Interrupted

LOOK = 0.2
"""Seconds between looks at the workers."""


def spread(
    board: Board, storage: str, workers: int, report: Callable[[], None], should_stop: Callable[[], bool]
) -> None:
    """Runs so many workers until every cell of the comparison is settled.

    Args:
        report: called now and then.
        should_stop: when true, the workers save the step they are in and end.

    Raises:
        Interrupted: see `should_stop`.
        GuilomoError: the workers ended with cells left.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    threads = max(1, torch.get_num_threads() // workers)
    arguments = (board.config.model_dump(mode="json"), storage, stop, threads)
    # A worker that is left behind by a parent that was killed notices that itself, see `_work`.
    children = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    for place, child in enumerate(children):
        with _accelerator(place):
            child.start()
    try:
        while any(child.is_alive() for child in children):
            report()
            if should_stop():
                stop.set()
            time.sleep(LOOK)
    except BaseException:
        for child in children:
            child.kill()
        raise
    finally:
        for child in children:
            child.join()
    report()
    if should_stop():
        raise Interrupted("The comparison stopped.")
    if left := board.open():
        codes = ", ".join(str(child.exitcode) for child in children)
        raise GuilomoError(
            f"The workers ended (exit codes {codes}) with {len(left)} cells left, first {left[0]}. See what "
            "they printed; then continue with --resume."
        )


def _work(settings: dict[str, Any], storage: str, stop: Any, threads: int) -> None:
    """One worker process, to its end."""
    # Ctrl-C reaches all processes of a terminal; the parent says what follows from it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # PEFT 0.21.2 reads an attribute that transformers 5.23 has renamed, each time an adapter is attached.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    torch.set_num_threads(threads)
    board = Board(CompareConfig.model_validate(settings))
    parent = multiprocessing.parent_process()

    def should_stop() -> bool:
        return stop.is_set() or (parent is not None and not parent.is_alive())

    try:
        Queue(board, storage, join=True).work(Worker(board, _silent, should_stop))
    except Interrupted:
        return


def _silent(stage: str, step: int, steps: int, text: str) -> None:
    """Workers in the background show nothing; the parent counts cells."""


@contextmanager
def _accelerator(place: int) -> Iterator[None]:
    """A process that is started within this sees one accelerator, where there are several."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = before.split(",") if before else [str(index) for index in range(torch.cuda.device_count())]
    if len(names) < 2:
        yield
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
