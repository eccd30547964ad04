"""Gives PEFT's converters to plain LoRA the one set of gates that a token-routed mixture lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from guilomo.errors import invalid
from guilomo.layers.packed import ExpertLayout
from guilomo.tuner.layer import LoraMoeLayer


@contextmanager
def fixed_gates(model: nn.Module, gates: Mapping[str, Tensor], adapter: str = "default") -> Iterator[None]:
    """Inside, ``peft.convert_to_lora`` and ``save_as_lora`` take every module's weight change at these gates (ours).

    The forward pass is not changed, and merging stays refused.

    Args:
        model: with the adapter attached.
        gates: module name to ``(E,)`` gates, such as those of `guilomo.export.mean_gates`.
        adapter: its name.

    Raises:
        GuilomoError: the gates of a module are missing or not one per expert.
    """
    layers = {m.name: m for m in model.modules() if isinstance(m, LoraMoeLayer) and adapter in m.molora_A}
    for name, layer in layers.items():
        layout = layer.molora_layout[adapter]
        assert isinstance(layout, ExpertLayout)
        experts = layout.experts
        given = gates.get(name)
        if given is None or tuple(given.shape) != (experts,):
            shape = None if given is None else tuple(given.shape)
            raise invalid(f"gates[{name!r}]", shape, f"one gate for each of the {experts} experts")
    for name, layer in layers.items():
        layer.fixed_gates[adapter] = gates[name]
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.fixed_gates[adapter]
