"""One adapted linear in every variant that is compared, all with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.speed.baselines import BASELINES, Mixture
from benchmarks.speed.shapes import ALPHA, LayerShape, LayerWeights
from guilomo.errors import unknown
from guilomo.layers.paths import PATHS, using
from guilomo.tuner import LoraMoeConfig

OURS = ("ours", *(f"ours:{path}" for path in PATHS if path != "kernels" or torch.cuda.is_available()))
"""Our layer as it chooses by itself, and on every path that can be taken here."""
MIXTURES = (*OURS, *BASELINES)
VARIANTS = ("frozen", "peft", *MIXTURES)
ADAPTER = "default"


def path_of(variant: str) -> str | None:
    """The path that a variant of our layer is held to; None where it chooses by itself."""
    return variant.partition(":")[2] or None


def unsupported(variant: str, shape: LayerShape) -> str | None:
    """Why a variant cannot compute a shape; None if it can."""
    return BASELINES[variant].unsupported(shape) if variant in BASELINES else None


def build_layer(variant: str, shape: LayerShape, weights: LayerWeights) -> nn.Module:
    """A module ``(T, I) -> (T, O)`` in training mode, its linear frozen and shared.

    Raises:
        GuilomoError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise unknown("variant", variant, VARIANTS)
    base = frozen_linear(weights.w)
    if variant == "frozen":
        return base
    if variant == "peft":
        return _peft(base, shape, weights)
    if variant in BASELINES:
        return BASELINES[variant](base, shape, weights)
    return _ours(base, shape, weights, path_of(variant))


def frozen_linear(weight: Tensor) -> nn.Linear:
    """A linear around an existing weight ``(O, I)``, without bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _Holder(nn.Module):
    """A model of one linear, for libraries that adapt models."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


def _adapted(base: nn.Linear, config: Any) -> nn.Module:
    """The adapted layer itself, without the model around it; adapters in the dtype of the linear."""
    # PEFT would put half-precision adapters into float32.
    model = get_peft_model(_Holder(base), config, autocast_adapter_dtype=False)
    layer: nn.Module = model.get_base_model().linear
    return layer.train()


@torch.no_grad()
def _peft(base: nn.Linear, shape: LayerShape, weights: LayerWeights) -> nn.Module:
    """Plain LoRA of rank R."""
    config = LoraConfig(r=shape.rank, lora_alpha=int(ALPHA), target_modules=["linear"])
    layer: Any = _adapted(base, config)
    layer.lora_A[ADAPTER].weight.copy_(weights.a)
    layer.lora_B[ADAPTER].weight.copy_(weights.b)
    return layer  # type: ignore[no-any-return]


@torch.no_grad()
def _ours(base: nn.Linear, shape: LayerShape, weights: LayerWeights, path: str | None) -> nn.Module:
    config = LoraMoeConfig(
        target_modules=["linear"],
        num_experts=shape.experts,
        rank_pattern={"linear": list(shape.ranks)},
        top_k=shape.top_k,
        lora_alpha=ALPHA,
        balance_loss=None,  # the compared layers have none
    )
    layer: Any = _adapted(base, config)
    layer.molora_A[ADAPTER].copy_(weights.a)
    layer.molora_B[ADAPTER].copy_(weights.b)
    layer.molora_router[ADAPTER].weight.copy_(weights.router)
    return layer if path is None else OnPath(layer, path)


class OnPath(nn.Module):
    """A module whose mixtures are all held to one path."""

    def __init__(self, inner: nn.Module, path: str) -> None:
        super().__init__()
        self.inner = inner
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with using(self.path):
            return self.inner(*args, **kwargs)


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def packed(layer: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors shaped like the trained parameters of a mixture, as ``a (R, I)``, ``b (O, R)`` and ``router (E, I)``."""
    if isinstance(layer, Mixture):
        a, b = layer.packed(values)
        return {"a": a, "b": b, "router": values["router"]}
    prefix = "inner." if isinstance(layer, OnPath) else ""
    ours = {
        "a": f"molora_A.{ADAPTER}",
        "b": f"molora_B.{ADAPTER}",
        "router": f"molora_router.{ADAPTER}.weight",
    }
    return {key: values[prefix + name] for key, name in ours.items()}


def forward_of(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """One forward with everything that the backward needs, but without it."""

    def run() -> Tensor:
        y: Tensor = layer(x)
        return y

    return run


def forward_backward_of(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """One forward and backward, down to the input; gradients are handed over, not added to earlier ones."""
    wanted = [x, *trained(layer).values()]

    def run() -> tuple[Tensor, ...]:
        # An expert that no token chose has no gradient.
        return torch.autograd.grad(layer(x), wanted, dy, allow_unused=True)

    return run
