"""Tells routers that are trained in stages how far the training is."""

from __future__ import annotations

from torch import nn

from guilomo.layers import Router


def follow_training(model: nn.Module, progress: float) -> None:
    """Puts every router into the stage that belongs to this part of the training (LoRA-Mixer, arXiv 2507.00029).

    Call it before every step of the optimiser in a loop of your own, and with 1.0 at the end. With Trainer, add
    `guilomo.training.RouterStageCallback`; `guilomo.training.fine_tune` does so by itself.

    Args:
        model: the adapted model. progress: steps done as a share of all, from 0 to 1.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.follow(progress)
