"""Wrapping a 7B model that has no weights yet."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.models import llama
from guilomo.allocation import Allocation, ModulePlan
from guilomo.tuner import LoraMoeConfig, target_shapes

SUFFIXES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXED = ((8,) * 8, (3, 8, 1, 5), (16, 2), (4, 4, 4, 4, 8, 8), (32,))
"""Ranks of the experts of the modules, in turn."""


def mixed_allocation(model: nn.Module) -> Allocation:
    """Another choice of ranks for every next linear."""
    shapes = target_shapes(model, LoraMoeConfig(target_modules=SUFFIXES))
    plans = {}
    for index, (name, shape) in enumerate(shapes.items()):
        ranks = MIXED[index % len(MIXED)]
        plans[name] = ModulePlan(*shape, ranks, min(2, len(ranks)))
    return Allocation(plans)


def measure_wrap(setting: Setting) -> Result:
    """Seconds of `get_peft_model`, and which parameters are real afterwards."""
    with torch.device("meta"):
        model = llama(4096, 32, "bf16", ffn=11008, heads=32, vocabulary=32000)  # Llama 2 7B
    plan = mixed_allocation(model)
    config = LoraMoeConfig(target_modules=SUFFIXES, allocation=plan)
    frozen = list(model.parameters())
    started = time.perf_counter()
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    theirs = {id(p) for p in frozen}
    adapters = [p for p in wrapped.parameters() if id(p) not in theirs]
    return {
        "options": {"modules": len(plan.modules), "parameters": sum(p.numel() for p in frozen)},
        "wrapped": {
            "seconds": round(seconds, 2),
            "frozen_parameters_materialised": _real(p for p in wrapped.parameters() if id(p) in theirs),
            "adapter_parameters": sum(p.numel() for p in adapters),
            "adapter_parameters_materialised": _real(adapters),
        },
    }


def _real(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if not p.is_meta)


CELLS = [Cell("wrap/llama-7b", measure_wrap)]
