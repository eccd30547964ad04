"""The state of a search as one file: everything that decides the bits of the steps to come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from guilomo.files import (
    flat,
    load_state,
    optimizer_tensors,
    random_tensors,
    refuse_other,
    restore_optimizer,
    restore_random,
    save_state,
    unflat,
)
from guilomo.search.trajectory import Trajectory

if TYPE_CHECKING:
    from guilomo.search.loop import Search

MIXTURE_OPTIONS = (
    "lora_alpha",
    "scaling",
    "lora_dropout",
    "dropout_on",
    "router",
    "router_options",
    "router_loss_coefficient",
    "balance_options",
    "balance_loss",
    "balance_coefficient",
    "balance_over",
    "balance_reduction",
    "z_loss_coefficient",
)
"""Options of the mixture that change a search; a checkpoint is continued under the same ones only."""


def save_search(search: Search, path: Path) -> None:
    """Writes weights, selection vectors, both optimisers, random numbers and records."""
    tensors = {"weights": flat(search.weights), "selection": flat(search.problem.selection)}
    tensors |= {f"trajectory.{k}": v for k, v in search.trajectory.tensors().items()}
    tensors |= optimizer_tensors(search.optimizer, "inner") | optimizer_tensors(search.outer_optimizer, "outer")
    tensors |= random_tensors(search.device)
    facts = {
        "identity": _identity(search),
        "step": search.step,
        "seconds": search.seconds,
        "trajectory": search.trajectory.numbers(),
        "looks": search.stability.looks,
        "estimate": search.foretold,
    }
    save_state(path, tensors, facts)


def resume_search(search: Search, path: Path) -> None:
    """Puts a search where `save_search` left it.

    Raises:
        GuilomoError: the file is damaged or of another search.
    """
    tensors, facts = load_state(path)
    refuse_other(path, facts["identity"], _identity(search))
    with torch.no_grad():
        for name, held in (("weights", search.weights), ("selection", search.problem.selection)):
            for parameter, saved in zip(held, unflat(tensors[name], [p.shape for p in held]), strict=True):
                parameter.copy_(saved)
    restore_optimizer(search.optimizer, tensors, "inner")
    restore_optimizer(search.outer_optimizer, tensors, "outer")
    recorded = {k.removeprefix("trajectory."): v for k, v in tensors.items() if k.startswith("trajectory.")}
    search.trajectory = Trajectory.restored(facts["trajectory"], recorded)
    search.step, search.seconds, search.foretold = facts["step"], facts["seconds"], facts["estimate"]
    search.stability.looks = facts["looks"]
    restore_random(tensors, search.device)


def _identity(search: Search) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    options = {name: getattr(search.mixture.options, name) for name in MIXTURE_OPTIONS}
    return {
        **search.config.model_dump(mode="json"),
        **options,
        "budget": search.budget,
        "train_rows": len(search.data.train),
        "held_out_rows": len(search.data.held_out),
        "data_hash": getattr(search.data, "data_hash", None),
        "trained_parameters": sum(w.numel() for w in search.weights),
        "modules": search.vectors.names,
    }
