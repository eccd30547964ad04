"""Time and memory of a search, from one measured step."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from guilomo.search.config import SearchConfig
from guilomo.search.data import Batch, mean_loss, row_losses
from guilomo.search.hypergradient import Problem
from guilomo.search.inner import Snapshot
from guilomo.search.split_pass import masked

PASSES = {"exact": 4.0, "authors_code": 3.0}
"""Extra forward-backwards of one outer step, beside its weight step, over rows of both kinds in equal parts."""


def estimate(problem: Problem, batch: Batch, config: SearchConfig) -> dict[str, float]:
    """Runs one forward and backward and extrapolates.

    Returns:
        ``seconds`` of the whole search, ``seconds_per_step``, ``memory_gib`` (weights, gradients, optimiser state and
        what the backward keeps). The model, its gradients and the random numbers are left as they were.
    """
    state = Snapshot.take(problem.weights)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    took = []
    for _ in range(2):  # the first pays for allocations
        started = time.perf_counter()
        with masked(problem.context, problem.vectors.masks()):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = mean_loss(*row_losses(problem.model, batch, problem.data))
            torch.autograd.grad(loss, problem.weights, allow_unused=True)
        took.append(time.perf_counter() - started)
    state.restore(problem.weights)
    draws = 2 if problem.vectors.pairs else 1
    return {
        "seconds": round(_seconds(min(took), config, draws), 1),
        "seconds_per_step": round(min(took), 4),
        "memory_gib": round(_memory(problem, kept, config, draws) / 2**30, 3),
    }


def _seconds(one_pass: float, config: SearchConfig, draws: int) -> float:
    """Of the whole search; rows that teach the selection vectors are seen under so many draws."""
    outer_steps = max(config.steps - config.warmup_steps, 0) / config.outer_every
    held_out = config.held_out_batch_size / config.batch_size
    if config.hypergradient == "first_order":
        per_outer = draws * held_out
    elif config.hypergradient == "unrolled":  # its first pass is that of the weight step
        per_outer = draws * (2 + held_out) - 1
    else:
        per_outer = draws * PASSES[config.hypergradient] * (1 + held_out) / 2
    return one_pass * (config.steps + outer_steps * per_outer)


def _memory(problem: Problem, kept: dict[int, int], config: SearchConfig, draws: int) -> float:
    held = {p.untyped_storage().data_ptr() for p in problem.model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in held)
    weights = sum(p.numel() * p.element_size() for p in problem.model.parameters())
    trained = sum(w.numel() * w.element_size() for w in problem.weights)
    copies = 1 + (2 if config.optimizer == "adamw" else 0) + (1 if config.hypergradient != "first_order" else 0)
    rows = 1 + draws * config.held_out_batch_size / config.batch_size
    return weights + copies * trained + activations * rows
