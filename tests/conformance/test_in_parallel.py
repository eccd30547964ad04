"""Data-parallel and fully sharded training in two processes: every gradient is exactly the mean over the processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel_jobs
import pytest
import torch
from parallel_jobs import LEARNING_RATE, PROCESSES, mixture, rows_of
from torch import Tensor

from adapter_tools import gradients, logits, reload
from tiny_models import build

pytestmark = pytest.mark.slow


def _run(job: Callable[[int, Path], None], folder: Path) -> list[Any]:
    """What each of the processes saved."""
    torch.multiprocessing.spawn(job, args=(folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def _mean_gradients() -> dict[str, Tensor]:
    """Of the processes' rows, one process after the other."""
    each = []
    for rank in range(PROCESSES):
        model = mixture()
        model(**rows_of(rank)).loss.backward()
        each.append(gradients(model))
    assert any(not torch.equal(each[0][n], each[1][n]) for n in each[0])
    return {n: sum(g[n] / PROCESSES for g in each) for n in each[0]}


def test_data_parallel(tmp_path: Path) -> None:
    wanted = _mean_gradients()
    assert len(wanted) == sum(p.requires_grad for p in mixture().parameters())
    for steps in _run(parallel_jobs.data_parallel, tmp_path):
        for found in steps:
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[n], g) for n, g in wanted.items())


def test_fully_sharded(tmp_path: Path) -> None:
    wanted = _mean_gradients()
    runs = _run(parallel_jobs.fully_sharded, tmp_path)
    for run in runs:
        assert run["gradients"].keys() == wanted.keys()
        assert all(torch.equal(run["gradients"][n], g) for n, g in wanted.items())
    trained = mixture()
    for name, parameter in trained.named_parameters():
        if name in wanted:
            parameter.data -= LEARNING_RATE * wanted[name]
    again = reload(build("llama"), tmp_path / "adapter")
    saved = dict(again.named_parameters())
    assert all(torch.equal(saved[n], p) for n, p in trained.named_parameters())
    assert all(torch.equal(logits(again, rows_of(0)), run["outputs"]) for run in runs)
