"""The Trainer callback of routers that are trained in stages."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guilomo.tuner import follow_training


class RouterStageCallback(TrainerCallback):
    """Keeps routers in the stage of the step that is trained; a continued training has the stage of its step."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        follow_training(kwargs["model"], state.global_step / state.max_steps)

    on_train_end = on_step_begin
