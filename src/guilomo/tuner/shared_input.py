"""Linears that read the same x: the first one called makes the narrow products of x for all of them.

Which linears may belong together is read off their names, so that it never changes while a model runs: results must not
depend on how many forward passes came before. Whether they really do is found at every call: a layer takes what
another made for it only if it is called with the very same tensor, unchanged. Otherwise it computes alone, so a wrong
guess costs time, never correctness.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from guilomo.layers.frozen_linear import Frozen
from guilomo.layers.fused import Member, Shrunk
from guilomo.layers.routed import Made

if TYPE_CHECKING:
    from guilomo.tuner.layer import LoraMoeLayer
    from guilomo.tuner.mixture import Mixture

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Last parts of the names of linears under one parent that read one x in the models of transformers."""
APART = ("cross", "encdec", "encoder_attn")
"""Where one of these is in the parent's name, keys and values read another model part than queries do."""


class Part(NamedTuple):
    """One layer's part in the products of x, and what its kernel has made already."""

    member: Member
    made: Made | None


class Reading(NamedTuple):
    """What a layer needs of its x on a path: the x that its frozen layer is to read, its products, the frozen product
    if our nodes make it, and what a kernel made."""

    path: str
    read: Tensor
    shrunk: Shrunk
    frozen: Frozen | None
    made: Made | None


@dataclass
class SharedInputs:
    """The layers of one model by name, and what is put aside in the forward pass now running."""

    layers: dict[str, LoraMoeLayer] = field(default_factory=dict)
    _aside: dict[str, tuple[_Seen, Reading]] = field(default_factory=dict)

    def companions(self, layer: LoraMoeLayer) -> list[Mixture]:
        """The mixtures of the other layers that are likely to be called with the same x."""
        found = (self.layers.get(name) for name in _companions(layer.name))
        return [mixture for other in found if other is not None and (mixture := _only_mixture(other, type(layer)))]

    def put_aside(self, layer: LoraMoeLayer, x: Tensor, reading: Reading) -> None:
        self._aside[layer.name] = _Seen(x), reading

    def take(self, layer: LoraMoeLayer, x: Tensor) -> Reading | None:
        """What was put aside for this call of the layer, or None."""
        found = self._aside.pop(layer.name, None)
        return found[1] if found is not None and found[0].is_still(x) else None

    def forget(self) -> None:
        """Lets go of what was put aside and not fetched."""
        self._aside.clear()


@cache
def _companions(name: str) -> tuple[str, ...]:
    parent, _, own = name.rpartition(".")
    if any(word in parent.rpartition(".")[2].lower() for word in APART):
        return ()
    group = next((group for group in TOGETHER if own in group), ())
    return tuple(f"{parent}.{other}" if parent else other for other in group if other != own)


def _only_mixture(layer: LoraMoeLayer, kind: type[LoraMoeLayer]) -> Mixture | None:
    """The one mixture that a layer would compute with; None if there is not just one."""
    if type(layer) is not kind or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    return layer.mixtures.get(layer.active_adapters[0])


class _Seen:
    """One state of one tensor."""

    def __init__(self, x: Tensor) -> None:
        self._x, self._version, self._grad = weakref.ref(x), _version(x), torch.is_grad_enabled()

    def is_still(self, x: Tensor) -> bool:
        return self._x() is x and self._version == _version(x) and self._grad == torch.is_grad_enabled()


def _version(x: Tensor) -> int:
    """How often x was changed in place; tensors of inference mode do not count."""
    return -1 if x.is_inference() else x._version
