"""Keeping experts near where they are while a router learns to use them (LoRA-Mixer, arXiv 2507.00029)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from guilomo.errors import GuilomoError
from guilomo.tuner.layer import LoraMoeLayer


def expert_weights(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of ``A (R, I)`` and ``B (O, R)`` of every module of an adapter by name, for `preservation_loss`."""
    return {name: p.detach().clone() for name, p in _experts(model, adapter).items()}


def preservation_loss(model: nn.Module, start: Mapping[str, Tensor], adapter: str = "default") -> Tensor:
    """``sum |theta - theta_0|^2`` over the experts' weights ``()``: the paper's L_pres without its factor beta.

    Add ``beta`` times it to the loss of a loop or ``compute_loss`` of your own; the published beta is not known to us.
    `guilomo.training.RouterStageCallback` does it for routers that ask for it.

    Args:
        model: the adapted model. start: `expert_weights` of the same adapter, at the start of the stage.

    Raises:
        GuilomoError: `start` is of another adapter or plan.
    """
    experts = _experts(model, adapter)
    if {n: p.shape for n, p in experts.items()} != {n: t.shape for n, t in start.items()}:
        raise GuilomoError("The given weights are not of this adapter's experts. Take them with expert_weights(model).")
    return torch.stack([(p - start[name]).square().sum() for name, p in experts.items()]).sum()


@torch.no_grad()
def add_preservation(model: nn.Module, start: Mapping[str, Tensor], weight: float, adapter: str = "default") -> None:
    """Adds the gradient of ``weight * preservation_loss`` to the gradients that the experts have, if they have any."""
    for name, parameter in _experts(model, adapter).items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter - start[name], alpha=2 * weight)


def _experts(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer) and adapter in m.molora_A]
    both = {"A": [m.molora_A[adapter] for m in layers], "B": [m.molora_B[adapter] for m in layers]}
    return {f"{m.name}.{letter}": p for letter, parts in both.items() for m, p in zip(layers, parts, strict=True)}
