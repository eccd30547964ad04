"""Gives PEFT's converters to plain LoRA the one set of gates that a token-routed mixture lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from guilomo.errors import invalid
from guilomo.layers.packed import ExpertLayout
from guilomo.layers.routers import TaskRouter
from guilomo.tuner.layer import LoraMoeLayer


def task_gates(model: nn.Module, task: int, adapter: str = "default") -> dict[str, Tensor]:
    """The gates ``(E,)`` of every module for one task, where they depend on nothing else (MOELoRA, arXiv 2310.18339).

    With them a mixture becomes plain LoRA (`guilomo.export.plain_lora`) or merged weights (``merge_and_unload`` within
    `fixed_gates`), both exactly what it computes for rows of that task.

    Raises:
        GuilomoError: there is no such task, or gates depend on the token.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer) and adapter in m.molora_A]
    return {layer.name: _gates_of(layer, task, adapter) for layer in layers}


def _gates_of(layer: LoraMoeLayer, task: int, adapter: str) -> Tensor:
    if adapter in layer.molora_router:
        router = layer.molora_router[adapter]
        if isinstance(router, TaskRouter):
            return router.gates_of(task)
    return layer.constant_gates(adapter)


@contextmanager
def fixed_gates(model: nn.Module, gates: Mapping[str, Tensor], adapter: str = "default") -> Iterator[None]:
    """Inside, ``peft.convert_to_lora`` and ``save_as_lora`` take every module's weight change at these gates (ours).

    The forward pass is not changed, and merging stays refused, unless the gates depend on nothing but the task (see
    `task_gates`): then ``merge_and_unload`` within gives the model of these gates.

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
