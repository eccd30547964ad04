"""How long some calls take."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Work = Callable[[], object]
Clock = Callable[[Work, int], float]
"""Runs the work so many times and returns the seconds of one."""


def wall_clock(work: Work, times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def cpu_clock(work: Work, times: int) -> float:
    """Time of the process alone, for one thread on a machine whose neighbours never pause."""
    started = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - started) / times


def event_clock(work: Work, times: int) -> float:
    """Time on the accelerator between the first kernel and the last."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(times):
        work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / times


CLOCKS: dict[str, Clock] = {"wall": wall_clock, "cpu": cpu_clock, "events": event_clock}


def captured(work: Work) -> Work:
    """The replay of a CUDA graph of the work: its kernels without the calls that launch them.

    Raises:
        RuntimeError: it cannot be captured, because the host has to wait for data in it.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    # What the graph writes to must not be given to others.
    return lambda: (graph.replay(), kept)
