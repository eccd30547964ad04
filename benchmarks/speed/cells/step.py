"""Whole training steps of whole models, and their optimiser by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.baselines import BASELINES
from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.clocks import Work
from benchmarks.speed.kernels import count
from benchmarks.speed.models import BERT_LINEARS, LLAMA_LINEARS, Adaptation, Adapted, llama, minilm, random_tokens
from benchmarks.speed.variants import OURS
from guilomo.evaluation.memory import peak_bytes

VARIANTS = ("peft", "frozen", *OURS, "ours+balance", *BASELINES)
"""``ours`` has no balance loss, like the others; ``ours+balance`` is the default config."""
CLIP = 1.0


@dataclass(frozen=True)
class Model:
    """A model and its batch.

    Attributes:
        make: the frozen model, on the present default device. linears: those that are adapted.
        rows, length: of the batch. decoder: every token has a label, or every row.
    """

    make: Callable[[str], nn.Module]
    linears: str
    rows: int
    length: int
    decoder: bool
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "length": self.length, "dtype": self.dtype, "linears": self.linears}

    def adaptation(self) -> Adaptation:
        return Adaptation(self.linears, (8,) * 8, 2, self.dtype)

    def base(self, setting: Setting) -> nn.Module:
        torch.manual_seed(setting.seed)
        return self.make(self.dtype).to(setting.device)

    def batch(self, base: nn.Module, setting: Setting) -> dict[str, Tensor]:
        """Embedded tokens that want a gradient, so that the frozen model has a backward too, and labels."""
        tokens = random_tokens(self.rows, self.length, setting.seed, setting.device)
        embedded = base.get_input_embeddings()(tokens)  # type: ignore[operator]
        labels = tokens if self.decoder else torch.arange(self.rows, device=setting.device) % 2
        return {"inputs_embeds": embedded.detach().requires_grad_(), "labels": labels}


def forward_backward_of(adapted: Adapted, batch: dict[str, Tensor]) -> Work:
    def run() -> None:
        adapted(**batch).loss.backward()

    return run


def update_of(adapted: Adapted, optimizer: torch.optim.Optimizer) -> Work:
    """Clipping and the optimiser's step, on whatever gradients are there."""

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(adapted.trained, CLIP)
        optimizer.step()

    return run


def step_of(adapted: Adapted, batch: dict[str, Tensor]) -> Work:
    """Forward, backward, clipping, AdamW; the frozen model has nothing to update."""
    forward_backward = forward_backward_of(adapted, batch)
    optimizer = adapted.adamw() if adapted.trained else None
    update = None if optimizer is None else update_of(adapted, optimizer)

    def run() -> None:
        forward_backward()
        if optimizer is not None and update is not None:
            update()
            optimizer.zero_grad(set_to_none=True)
        batch["inputs_embeds"].grad = None

    return run


def measure_step(model: Model, setting: Setting, variants: tuple[str, ...] = VARIANTS) -> Result:
    base = model.base(setting)
    batch = model.batch(base, setting)
    every = {v: model.adaptation().apply(v, base) for v in variants}
    counts = {v: _counted(adapted, batch) for v, adapted in every.items()}
    works = {v: step_of(adapted, batch) for v, adapted in every.items()}
    linears = len(model.adaptation().names(base))
    return {
        "options": {**model.to_dict(), "adapted_linears": linears},
        "counts": counts,
        "times": {"step": setting.time(works, "peft", setting.few)},
    }


def _counted(adapted: Adapted, batch: dict[str, Tensor]) -> dict[str, Any]:
    def run() -> None:
        forward_backward_of(adapted, batch)()
        adapted.model.zero_grad(set_to_none=True)
        batch["inputs_embeds"].grad = None

    return {
        "forward_backward": count(run).to_dict(),
        "peak_bytes": peak_bytes(run),
        "trained_tensors": len(adapted.trained),
        "trained_parameters": sum(p.numel() for p in adapted.trained),
    }


def measure_update(model: Model, setting: Setting) -> Result:
    """Clipping and AdamW alone, on gradients that one backward left."""
    base = model.base(setting)
    batch = model.batch(base, setting)
    works, tensors = {}, {}
    for variant in ("peft", "ours", "sparse_loop"):
        adapted = model.adaptation().apply(variant, base)
        forward_backward_of(adapted, batch)()
        works[variant] = update_of(adapted, adapted.adamw())
        tensors[variant] = {"trained_tensors": len(adapted.trained)}
    return {"options": model.to_dict(), "counts": tensors, "times": {"update": setting.time(works, "peft")}}


def llama_model(dtype: str) -> Model:
    return Model(lambda d: llama(1024, 6, d, ffn=2816), LLAMA_LINEARS, 4, 256, True, dtype)


def minilm_model(dtype: str) -> Model:
    return Model(minilm, BERT_LINEARS, 32, 64, False, dtype)


def step_cell(name: str, model: Model, variants: tuple[str, ...] = VARIANTS) -> Cell:
    return Cell(f"step/{name}-{model.dtype}", lambda setting: measure_step(model, setting, variants))


def update_cell(name: str, model: Model) -> Cell:
    return Cell(f"update/{name}-{model.dtype}", lambda setting: measure_update(model, setting))


QUICK = Model(lambda d: llama(256, 2, d, heads=4), LLAMA_LINEARS, 4, 64, True, "bf16")
CELLS = [
    *(step_cell("llama", llama_model(dtype)) for dtype in ("bf16", "fp32")),
    *(step_cell("minilm", minilm_model(dtype)) for dtype in ("bf16", "fp32")),
    *(update_cell("llama", llama_model(dtype)) for dtype in ("bf16", "fp32")),
]
