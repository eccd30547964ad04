"""Counts the bytes of tensors that are kept for the backward; those alive at once: `guilomo.evaluation.memory`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from guilomo.evaluation.memory import storage_of


def saved_bytes(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps after `forward`, without those of the `given` tensors.

    Args:
        given: what exists anyway, such as parameters, buffers and the input.
    """
    known = {storage_of(tensor) for tensor in given}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in known:
            kept[storage_of(tensor)] = tensor.untyped_storage().nbytes()
            held.append(tensor)  # an address must not be given to another storage while we count
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
