"""What a training step of each method costs beside plain LoRA's: time and peak memory, as ratios.

Trainings that ran side by side, or on other machines, say nothing about step time. So it is measured after them, in
one process, with the two methods taking turns; the median of the ratios of neighbouring steps stands for the method.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guilomo.allocation import Allocation
from guilomo.compare.work import Worker
from guilomo.errors import GuilomoError
from guilomo.evaluation.memory import peak_bytes
from guilomo.evaluation.ranks import median_interval
from guilomo.run import Run
from guilomo.run.config import MethodConfig
from guilomo.run.files import read_json, write_json
from guilomo.run.methods import attach
from guilomo.training import Interrupted

Step = Callable[[], None]
ROUNDS = (9, 41)
"""Least and most rounds: 9 give a 95 % interval that leaves out a stray value on each side."""
SECONDS = 2.0
"""After so long no more rounds than the least are begun."""
SAME = {"step_time_ratio": {"median": 1.0, "low": 1.0, "high": 1.0}, "peak_bytes_ratio": 1.0, "error": None}


def costs_file(worker: Worker, task: str) -> Path:
    """Where the costs of a task's methods lie."""
    return worker.board.runs[task].folder / "costs.json"


def measure_costs(worker: Worker) -> None:
    """Writes costs.json of every task, for the methods that have a plan; those that are there stay.

    Raises:
        Interrupted: the worker was asked to stop.
    """
    config = worker.board.config
    total, done = len(config.tasks) * len(config.methods), 0
    for task in config.tasks:
        path = costs_file(worker, task.name)
        found = read_json(path) if path.exists() else {}
        for method in config.methods:
            if worker.should_stop():
                raise Interrupted("The comparison stopped while its costs were measured.")
            if method.name not in found and (cost := _cost(worker, task.name, method)):
                found[method.name] = cost
                write_json(path, found)
            done += 1
            worker.progress("costs", done, total, "")


def _cost(worker: Worker, task: str, method: MethodConfig) -> dict[str, Any] | None:
    """The ratios of one method to the reference; None where one of the two has no plan."""
    reference = worker.board.config.reference
    plans = [_plan(worker, task, m) for m in (method, reference)]
    if None in plans:
        return None
    if method == reference:
        return SAME
    try:
        steps = [_step(worker.job(task, m.name), m, plan) for m, plan in zip((method, reference), plans, strict=True)]
        times = median_interval(_ratios(*steps))
        own, plain = (peak_bytes(step) for step in steps)
    except (RuntimeError, GuilomoError) as error:  # two models at once may not fit where one does
        return {"step_time_ratio": None, "peak_bytes_ratio": None, "error": str(error).splitlines()[0]}
    ratio = {"median": times.value, "low": times.low, "high": times.high}
    return {"step_time_ratio": ratio, "peak_bytes_ratio": own / plain, "error": None}


def _plan(worker: Worker, task: str, method: MethodConfig) -> Allocation | None:
    """The plan of the first seed that has one."""
    run = worker.board.runs[task]
    places = [run.folder / "methods" / method.name / f"seed-{seed}" / "allocation.json" for seed in run.seeds]
    return next((Allocation.load(place) for place in places if place.exists()), None)


def _step(job: Run, method: MethodConfig, plan: Allocation | None) -> Step:
    """A training step on a batch from all over the rows: forward, backward and update, at rate 0 without effect."""
    assert plan is not None
    seed = job.config.seeds[0]
    model: nn.Module = attach(job.fresh_model(seed), plan, method, job.config, job.task).train()
    device = next(model.parameters()).device
    # From all over: a mixed task begins with the rows of its first part, which may be the shortest.
    size = job.config.train.batch_size
    rows = job.task.train[:: max(1, len(job.task.train) // size)][:size]
    batch = {name: value.to(device) for name, value in job.task.collate(rows).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # what the first step allocates for good is not its own
    return step


def _ratios(own: Step, reference: Step) -> list[float]:
    """Time of the one over the other's, round by round; who goes first changes every round."""
    least, most = ROUNDS
    started, found = time.perf_counter(), list[float]()
    while len(found) < least or (len(found) < most and time.perf_counter() - started < SECONDS):
        if len(found) % 2:
            plain = _seconds(reference)
            found.append(_seconds(own) / plain)
        else:
            mine = _seconds(own)
            found.append(mine / _seconds(reference))
    return found


def _seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
