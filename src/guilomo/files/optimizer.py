"""An optimiser's state as a few large tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guilomo.files.state import flat, unflat

SCALAR = "step"
"""The one entry of torch's optimisers that is one number per parameter."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The state of all parameters, one tensor per kind of entry, and which parameters have any."""
    parameters = _parameters(optimizer)
    held = [i for i, p in enumerate(parameters) if optimizer.state.get(p)]
    entries = [optimizer.state[parameters[i]] for i in held]
    kinds = [k for k in (entries[0] if entries else {}) if entries[0][k] is not None]
    found = {f"{prefix}.{kind}": flat([torch.as_tensor(entry[kind]) for entry in entries]) for kind in kinds}
    return {**found, f"{prefix}.held": torch.tensor(held, dtype=torch.int64)}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Puts back what `optimizer_tensors` gave.

    Raises:
        GuilomoError: `tensors` come from `load_state` and lack the state.
    """
    held = tensors[f"{prefix}.held"].tolist()
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Any]] = {i: {} for i in held}
    for name in [n for n in tensors if n.startswith(f"{prefix}.") and n != f"{prefix}.held"]:
        kind = name.removeprefix(f"{prefix}.")
        shapes = [torch.Size() if kind == SCALAR else parameters[i].shape for i in held]
        for i, value in zip(held, unflat(tensors[name], shapes), strict=True):
            state[i][kind] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
