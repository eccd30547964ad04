"""Search checkpoints: one safetensors file, written beside the old one and then put in its place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guilomo.errors import GuilomoError


def save_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes tensors and JSON facts atomically: a crash leaves the previous file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    # Copies: safetensors refuses tensors that share memory.
    copies = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    save_file(copies, unfinished, metadata={"facts": json.dumps(facts)})
    with open(unfinished, "rb") as written:
        os.fsync(written.fileno())
    os.replace(unfinished, path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_state` wrote.

    Raises:
        GuilomoError: the file is damaged or is not such a file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return tensors, json.loads(metadata["facts"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise GuilomoError(
            f"{path} is not a usable checkpoint ({error}). Delete it to start this stage again from its beginning."
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimiser's state as named tensors; numbers become tensors too."""
    found: dict[str, Tensor] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{prefix}.{index}.{key}"] = torch.as_tensor(value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Puts back what `optimizer_tensors` gave."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for name, value in tensors.items():
        if name.startswith(f"{prefix}."):
            _, index, key = name.rsplit(".", 2)
            parameter = parameters[int(index)]
            # Adam keeps its step counter on the CPU.
            place = value.clone() if key == "step" else value.to(parameter.device, copy=True)
            optimizer.state[parameter][key] = place
