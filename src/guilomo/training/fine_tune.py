"""Fine-tuning an adapted model on a task with transformers' Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from guilomo.errors import GuilomoError
from guilomo.layers import RouterHealth
from guilomo.tasks import Task
from guilomo.training.callbacks import Progress, ProgressCallback, RouterHealthCallback
from guilomo.training.config import TrainConfig
from guilomo.tuner import context_of


class Interrupted(Exception):
    """The run was asked to stop; what was done is saved and can be continued."""


@dataclass
class TrainResult:
    """What fine-tuning did.

    Attributes:
        steps, seconds, step_seconds: optimiser steps in all, and time of this process's part of them.
        loss_curve: ``(step, mean training loss since the last point)``.
        health: router health by module; empty where nothing is routed.
    """

    steps: int
    seconds: float
    step_seconds: float
    loss_curve: list[tuple[int, float]]
    health: dict[str, RouterHealth]


def training_arguments(config: TrainConfig, folder: Path, seed: int) -> TrainingArguments:
    """Trainer's arguments for `config`."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=config.log_every,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=1,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        # Pinned memory needs an accelerator; without one torch warns at every epoch.
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def fine_tune(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    folder: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Trains the model's adapter; a checkpoint found in `folder` is continued, to the same bits.

    Args:
        model: a PeftModel. task: its rows. folder: for checkpoints.
        seed: of data order and dropout. progress: called as (step, steps, text).
        should_stop: asked after every step; when true a checkpoint is written and `Interrupted` raised.

    Raises:
        GuilomoError: the loss is not finite.
        Interrupted: see `should_stop`.
    """
    folder = Path(folder)
    rows = [*task.train, *task.held_out] if config.use_held_out else task.train
    health = RouterHealthCallback(context_of(model.get_base_model()))  # type: ignore[operator]
    callbacks = [health, ProgressCallback(progress, should_stop)]
    trainer = Trainer(
        model=model,
        args=training_arguments(config, folder, seed),
        train_dataset=rows,
        data_collator=task.collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    started, before = time.perf_counter(), _last_step(folder)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.is_dir() else None)
    seconds = time.perf_counter() - started
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"Training stopped at step {trainer.state.global_step} of {trainer.state.max_steps}.")
    curve = [(int(log["step"]), float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
    _refuse_not_finite(curve, config)
    done = max(trainer.state.global_step - before, 1)
    return TrainResult(trainer.state.global_step, seconds, seconds / done, curve, health.health)


def _last_step(folder: Path) -> int:
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return int(Path(found).name.rsplit("-", 1)[1]) if found else 0


def _refuse_not_finite(curve: list[tuple[int, float]], config: TrainConfig) -> None:
    bad: list[Any] = [step for step, loss in curve if not math.isfinite(loss)]
    if bad:
        raise GuilomoError(
            f"The training loss was not finite at step {bad[0]}. "
            f"Lower train.learning_rate (now {config.learning_rate})."
        )
