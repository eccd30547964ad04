"""What the processes of `test_distributed_search` run; a module of its own, so that fresh processes import no tests."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from search_tools import Regression, Residual, bits_of, mixture, small_config
from torch import Tensor

from guilomo import GuilomoError
from guilomo.search import Search
from guilomo.search import loop as loop_module
from guilomo.search.distributed import all_reduce_gradients, rank

CASES: dict[str, dict[str, Any]] = {
    "log": {},
    "modules may go": {"min_experts": 0},
    "soft masks": {"masks": "soft"},
    "mean, SGD": {"outer_loss": "mean", "optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.05},
    "unrolled": {"hypergradient": "unrolled", "max_grad_norm": 0.05},
    "unrolled, mean": {"hypergradient": "unrolled", "outer_loss": "mean", "optimizer": "sgd", "learning_rate": 0.1},
    "prefix, authors": {"relaxation": "prefix", "hypergradient": "authors_code"},
    "stops early": {"steps": 40, "patience": 2, "outer_learning_rate": 1e-9, "budget_weight": 0},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mean, SGD": {"balance_loss": "cv_squared", "balance_over": "layer"},
    "unrolled, mean": {"balance_loss": "sign", "balance_reduction": "mean"},
}
RESUMED = {"steps": 7, "checkpoint_every": 3, "final_temperature": 0.3}


class UnevenRows(Regression):
    """Rows count for one label or for four, so that equal shares of rows are unequal shares of the loss."""

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sums, _ = super().row_loss(logits, labels)
        counts = torch.where(labels[:, 0] > 0, 4, 1)
        return sums * counts, counts


def joint_search(case: str, folder: Path | None = None, mixture_options: Any = None, **options: Any) -> Search:
    """A search in float64 with router losses, 5 training and 3 held-out rows a step: no even shares."""
    given = {"batch_size": 5, "held_out_batch_size": 3, "steps": 9, **CASES[case], **options}
    config = small_config(**given)
    torch.manual_seed(5)
    data = UnevenRows(torch.randn(32, 8, dtype=torch.float64), torch.randn(32, 8, dtype=torch.float64))
    losses = {"balance_coefficient": 0.5, "z_loss_coefficient": 0.1}
    net = Residual(depth=3, width=8)
    model = mixture(net, config, **{**losses, **MIXTURES.get(case, {}), **(mixture_options or {})})
    model.double()
    size = sum(p.numel() for n, p in model.named_parameters() if ".molora_" in n)
    search = Search(model, data, config, int(0.7 * size), folder)
    search.vectors.double()
    return search


def followed(search: Search) -> dict[str, Any]:
    """Runs a search; returns its result, its bits and the gradients of every step."""
    gradients: list[list[Tensor]] = []

    def noting(update: Callable[..., None], tensors: list[Tensor]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            gradients.append([g.grad.clone() for g in tensors])
            update(*args)

        return run

    search._update_weights = noting(search._update_weights, search.weights)
    search._outer_update = noting(search._outer_update, search.problem.selection)
    result = search.run()
    return {
        "gradients": gradients,
        "bits": bits_of(search),
        "allocation": result.allocation.to_json(),
        "trajectory": result.trajectory.to_dict(["a", "b", "c"]),
        "result": (result.steps, result.outer_steps, result.stopped_early, result.seconds, result.estimate),
    }


def _stopped(folder: Path, stop: int, asking: int, **options: Any) -> Search:
    """A search with dropout; process `asking` asks to stop at a step, the others never do."""
    search = joint_search("log", folder, {"lora_dropout": 0.2}, **RESUMED, **options)
    search.run(should_stop=lambda: search.step == stop and rank() == asking)
    return search


def _resumed(folder: Path) -> dict[str, Any]:
    """The bits of a whole search, and of searches stopped and continued at every step."""
    found = {0: bits_of(_stopped(folder / "whole", 0, 0))}
    for stop in range(1, RESUMED["steps"]):
        assert _stopped(folder / str(stop), stop, 0).step == stop
        found[stop] = bits_of(_stopped(folder / str(stop), 0, 0))
    return found


def _refused(folder: Path) -> dict[str, str]:
    found = {}
    hidden = folder / f"of process {rank()}"
    _stopped(folder / "seen by one", 4, 0)
    if rank() == 0:
        (folder / "seen by one").rename(hidden)
    jobs: dict[str, Callable[[], Any]] = {
        "exact": lambda: joint_search("log", hypergradient="exact"),
        "batch_size": lambda: joint_search("log", batch_size=1),
        "held_out_batch_size": lambda: joint_search("log", held_out_batch_size=1),
        "folder": lambda: joint_search("log", hidden, {"lora_dropout": 0.2}, **RESUMED).resume(),
    }
    for name, job in jobs.items():
        try:
            job()
        except GuilomoError as error:
            found[name] = str(error)
    return found


def _never(*_: Any) -> None:
    raise AssertionError("only process 0 writes checkpoints")


def _joins(number: int, count: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=number, world_size=count)


def all_cases(number: int, count: int, folder: Path) -> None:
    """Entry of one process: everything that the tests compare, written to ``NUMBER.pt``; then process 1 dies."""
    torch.set_num_threads(1)
    _joins(number, count, folder)
    if number > 0:
        loop_module.save_search = _never
    found = {
        "cases": {case: followed(joint_search(case)) for case in CASES},
        "resumed": _resumed(folder),
        "asked": [_stopped(folder / f"asked {i}", 3, asking=i).step for i in range(count)],
        "refused": _refused(folder),
        "unlike": _unlike(),
        "summed": _summed(),
    }
    torch.save(found, folder / f"{number}.pt")
    _one_leaves(number, folder)


def _unlike() -> list[Tensor]:
    """The weights of a search whose model every process made with other weights."""
    config = small_config()
    torch.manual_seed(rank())
    data, net = UnevenRows(torch.ones(8, 8), torch.ones(8, 8)), Residual(depth=3, width=8)
    return [w.detach().clone() for w in Search(mixture(net, config), data, config, 300).weights]


def _summed() -> list[Tensor | None]:
    """Summed gradients of three tensors that both processes, only process 1, and none reached."""
    tensors = [torch.zeros(n, requires_grad=True) for n in (1, 2, 3)]
    tensors[0].grad = torch.tensor([float(1 + rank())])
    if rank() == 1:
        tensors[1].grad = torch.tensor([0.5, 7.0])
    all_reduce_gradients(tensors)
    return [t.grad for t in tensors]


def _one_leaves(number: int, folder: Path) -> None:
    """Process 1 is gone after two steps of a search; the others write to ``left NUMBER.pt`` how they ended."""

    def leave(step: int, steps: int, text: str) -> None:
        if number == 1 and step == 2:
            os._exit(3)

    started = time.monotonic()
    try:
        joint_search("log").run(leave)
    except RuntimeError as error:
        torch.save({"error": str(error), "seconds": time.monotonic() - started}, folder / f"left {number}.pt")
