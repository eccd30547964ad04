"""Moves the selection biases of routers that are balanced without a loss, once per optimiser step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from guilomo.layers.routers.biased import BiasedRouter


def biased_routers(model: nn.Module) -> list[BiasedRouter]:
    """The routers of a model that have such a bias, in the model's order."""
    return [m for m in model.modules() if isinstance(m, BiasedRouter)]


def update_router_biases(model: nn.Module) -> None:
    """Moves every bias by the counts since the last call, summed over all processes (SMoRA, arXiv 2501.15103).

    Call it after every ``optimizer.step()`` of a loop of your own, in all processes. With Trainer, add
    `guilomo.training.RouterBiasCallback`; `guilomo.training.fine_tune` does so by itself.
    """
    routers = biased_routers(model)
    if not routers:
        return
    device = routers[0].bias.device
    counts = [router.take_counts() for router in routers]
    together = torch.cat([c.to(device) for c in counts])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(together)
    for router, total in zip(routers, together.split([len(c) for c in counts]), strict=True):
        router.move_bias(total.to(router.bias.device))
