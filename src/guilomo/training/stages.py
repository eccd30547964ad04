"""The Trainer callback of routers that are trained in stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guilomo.files import load_state, save_state
from guilomo.layers.routers import LoraMixerRouter
from guilomo.tuner import add_preservation, expert_weights, follow_training

START_FILE = "experts_start.safetensors"
"""In a checkpoint's folder: where the experts were when the soft stage began."""


class RouterStageCallback(TrainerCallback):
    """Keeps routers in the stage of the step that is trained; a continued training has the stage of its step.

    Where the routers ask for it (`LoraMixerRouter`, option preserve), the gradient of ``preserve |theta - theta_0|^2``
    is added to that of the experts in the soft stage, after the clipping; theta_0 is where they were when it began.
    """

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = _start_file(args, state)
        if state.global_step and path.is_file():
            self.start = {name: tensor.to(args.device) for name, tensor in load_state(path)[0].items()}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        follow_training(model, state.global_step / state.max_steps)
        if _preserved(model) and not self.start and not _hard(model):
            self.start = expert_weights(model, model.active_adapter)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if self.start:
            add_preservation(model, self.start, _preserved(model), model.active_adapter)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        path = _start_file(args, state)
        if self.start and state.is_world_process_zero and path.parent.is_dir():
            save_state(path, self.start, {})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        follow_training(kwargs["model"], state.global_step / state.max_steps)


def _preserved(model: nn.Module) -> float:
    """What the routers of a model weigh the preservation of the experts by; 0: not at all."""
    return max((router.preserve for router in _staged(model)), default=0.0)


def _hard(model: nn.Module) -> bool:
    return any(router.stage == "hard" for router in _staged(model))


def _staged(model: nn.Module) -> list[LoraMixerRouter]:
    return [m for m in model.modules() if isinstance(m, LoraMixerRouter)]


def _start_file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / START_FILE
