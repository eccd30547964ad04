"""The Trainer callback of routers that are balanced without a loss."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guilomo.tuner import update_router_biases


class RouterBiasCallback(TrainerCallback):
    """Moves selection biases after every step of the optimiser; without such routers it does nothing."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        update_router_biases(kwargs["model"])
