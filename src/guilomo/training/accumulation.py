"""The scale of router losses under losses from which it cannot be measured."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guilomo.tuner import LoraMoeLayer


class AccumulationCallback(TrainerCallback):
    """Weighs router losses by 1 / ``gradient_accumulation_steps`` where the trainer's scaling cannot be measured.

    Preference losses (TRL's `DPOTrainer`) push some log-probabilities up and others down, and label smoothing bypasses
    the model's loss. There a router loss would have weight 1 in every micro-batch; with this callback it is a mean over
    them. Where the scale is measured, the callback changes nothing. A last step of an epoch with fewer micro-batches is
    weighed as if it had all of them.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        _weigh(model, 1 / args.gradient_accumulation_steps)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        _weigh(model, 1.0)


def _weigh(model: nn.Module | None, weight: float) -> None:
    for module in model.modules() if model is not None else ():
        if isinstance(module, LoraMoeLayer):
            module.context.scale.unmeasured = weight
