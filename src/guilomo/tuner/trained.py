"""Training the routers alone, over experts that exist already (MeteoRA, arXiv 2405.13053; LoRA-Mixer, 2507.00029)."""

from __future__ import annotations

from torch import nn

from guilomo.errors import GuilomoError
from guilomo.tuner.layer import LoraMoeLayer


def train_only_routers(model: nn.Module, adapter: str = "default") -> None:
    """Freezes the experts of an adapter; its routers, and what they share, stay trained. Make the optimiser afterwards.

    PEFT's ``set_adapter`` makes all of an adapter trainable again.

    Raises:
        GuilomoError: no router of the adapter has parameters.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer) and adapter in m.molora_A]
    parts = [d[adapter] for layer in layers for d in (layer.molora_router, layer.molora_shared) if adapter in d]
    if not any(True for part in parts for _ in part.parameters()):
        raise GuilomoError(f"Adapter {adapter!r} has no router with parameters, so that nothing would be trained.")
    for layer in layers:
        layer.molora_A[adapter].requires_grad_(False)
        layer.molora_B[adapter].requires_grad_(False)
