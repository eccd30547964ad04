"""Full experts: copies of a model whose feed-forwards have moved, and routers that are told whom to choose."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from guilomo.layers.routing import Router
from guilomo.sparse_moe import feed_forwards


def linears_of(model: nn.Module) -> list[str]:
    """The linears of its feed-forwards."""
    return [linear for linears in feed_forwards(model).values() for linear in linears]


def expert_of(base: nn.Module, seed: int, part: str = "") -> Any:
    """A copy of the base whose feed-forwards, or the linears with `part` in their names, are others."""
    expert = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in linears_of(base):
            weight = expert.get_parameter(f"{linear}.weight")
            if part in linear:
                weight += 0.2 * torch.randn(weight.shape, generator=generator).to(weight)
    return expert


def experts_of(base: nn.Module) -> dict[str, Any]:
    """Three of them."""
    return {name: expert_of(base, seed) for seed, name in enumerate(("law", "maths", "code"))}


def save_experts(experts: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    """A folder of their folders."""
    for name, expert in experts.items():
        expert.save_pretrained(folder / name, **options)
    return folder


def send_everything_to(model: PeftModel, expert: int) -> None:
    """Every router is so sure of one expert that the others get a weight of exactly 0."""
    for router in model.modules():
        if isinstance(router, Router):
            scores = torch.full((router.experts,), -1e4)
            scores[expert] = 0
            router.logits = _Scores(scores)  # type: ignore[method-assign, assignment]


class _Scores:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def __call__(self, x: Tensor) -> Tensor:
        return self.scores.to(x).expand(*x.shape[:-1], len(self.scores))
