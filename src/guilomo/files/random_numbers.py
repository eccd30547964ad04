"""The state of every random number generator that a training step may draw from."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of Python's, NumPy's and torch's generators, and of the accelerator's."""
    version, words, _ = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    found = {
        "random.python": torch.tensor([version, *words]),
        "random.numpy": torch.tensor([*numpy[1].tolist(), numpy[2]]),
        "random.torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        found["random.cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_random(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Puts back what `random_tensors` gave.

    Raises:
        GuilomoError: `tensors` come from `load_state` and lack a state.
    """
    version, *words = tensors["random.python"].tolist()
    # A second normal number kept back by either generator is not among the words.
    random.setstate((version, tuple(words), None))
    *keys, place = tensors["random.numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, 0, 0.0))
    torch.set_rng_state(tensors["random.torch"])
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
