"""The search in several processes: every collective operation it needs, and none of them in a single process.

Each process takes its share of the rows of every global batch. Sums over rows are added over all processes before
anything that is not linear (a mean over labels, a logarithm, a balance loss) is done to them, and each process
differentiates through its own rows. Its gradient is then its exact share of the global batch's, and the shares are
added (ours).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.layers.balance import RouterStatistics
from guilomo.search.config import SearchConfig


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that ``torchrun`` or ``accelerate launch`` started, each with an accelerator if there is one.

    Nothing happens in a single process, or where the group exists already.

    Raises:
        GuilomoError: there are more processes than accelerators.
    """
    if _started() == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        _take_accelerator(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count())
    dist.init_process_group()
    yield
    # Not after a failure: closing may wait for the others, who wait for this process.
    dist.destroy_process_group()


def _started() -> int:
    """Number of processes that the launcher started, joined or not."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _take_accelerator(place: int, count: int) -> None:
    if place >= count:
        raise GuilomoError(
            f"Process {place} of this machine has no accelerator of its own: there are {count}. Start at most "
            "so many processes (--nproc-per-node), or hide the accelerators (CUDA_VISIBLE_DEVICES=) to use the CPU."
        )
    torch.cuda.set_device(place)


def world() -> int:
    """Number of processes that search together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0; process 0 writes and decides."""
    return dist.get_rank() if world() > 1 else 0


def share(rows: list[int]) -> list[int]:
    """This process's rows of a global batch: every `world()`-th, so that shares differ by one row at most."""
    return rows[rank() :: world()]


class _Total(torch.autograd.Function):
    """Sum over processes in the forward pass; the backward stays with this process's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


def totals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over all processes of several tensors, shaped like them; differentiable through this process's part."""
    if world() == 1:
        return list(tensors)
    summed = _Total.apply(torch.cat([t.reshape(-1) for t in tensors])).split([t.numel() for t in tensors])
    return [s.view_as(t).to(t.dtype) for s, t in zip(summed, tensors, strict=True)]


def total_statistics(statistics: RouterStatistics) -> RouterStatistics:
    """Router statistics of the global batch, so that a balance loss is that of a single process.

    Raises:
        GuilomoError: the loss is not made of sums over tokens.
    """
    if statistics.rows.dim():
        raise GuilomoError(
            "balance_loss = 'localized' compares the rows of a batch, which no sum over processes does. Search in one "
            "process, or with balance_loss = 'cv_squared'."
        )
    return RouterStatistics(*totals(list(vars(statistics).values())))


@torch.no_grad()
def all_reduce_gradients(parameters: Sequence[Tensor]) -> None:
    """Adds the gradients of all processes in place; a parameter that no process reached keeps None."""
    if world() == 1:
        return
    reached = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    by_any, *summed = totals([reached.to(gradients[0].dtype), *gradients])
    for p, known, gradient in zip(parameters, by_any.tolist(), summed, strict=True):
        p.grad = gradient if known else None


def same_everywhere(*values: float, device: torch.device) -> tuple[float, ...]:
    """Process 0's values on every process, for decisions and clocks."""
    if world() == 1:
        return values
    told = torch.tensor(values, dtype=torch.float64, device=device)
    dist.broadcast(told, 0)
    return tuple(told.tolist())


@torch.no_grad()
def start_alike(tensors: Sequence[Tensor]) -> None:
    """Gives every process the tensors of process 0."""
    if world() > 1:
        for t in tensors:
            dist.broadcast(t, 0)


def seed_step(seed: int, step: int) -> None:
    """Random numbers of a step, other ones in every process; a single process draws on instead."""
    if world() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * world() + rank())


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if world() > 1:
        dist.barrier()


def check_processes(config: SearchConfig, device: torch.device) -> None:
    """Refuses what several processes cannot do.

    Raises:
        GuilomoError: the launcher's processes have not joined, a batch has fewer rows than there are processes,
            ``hypergradient = 'exact'``, or a model that is not on this process's own accelerator.
    """
    if _started() > world():
        raise GuilomoError(
            f"{_started()} processes were started (WORLD_SIZE), but each would search alone. Start `search` with the "
            "launcher and everything else in one process; in Python, search within guilomo.search.process_group()."
        )
    if world() == 1:
        return
    for name in ("batch_size", "held_out_batch_size"):
        if getattr(config, name) < world():
            raise GuilomoError(
                f"search.{name} = {getattr(config, name)} leaves a process without rows: it counts the rows of all "
                f"{world()} processes. Raise it to at least {world()}, or start fewer processes."
            )
    if config.hypergradient == "exact":
        raise GuilomoError(
            f"hypergradient = 'exact' runs in one process, not in {world()}: its second derivatives do not add up over "
            "processes. Use 'unrolled', or start one process."
        )
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise GuilomoError(
            f"Process {rank()} was given {device}, but its own accelerator is cuda:{torch.cuda.current_device()}. "
            "Leave model.device = 'auto'."
        )
