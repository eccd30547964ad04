"""Fine-tuning an adapted model on a task with transformers' Trainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments

from guilomo.layers import RouterHealth
from guilomo.tasks import Task
from guilomo.training.biases import RouterBiasCallback
from guilomo.training.callbacks import FiniteLossCallback, Progress, ProgressCallback, RouterHealthCallback
from guilomo.training.checkpoint import FileTrainer
from guilomo.training.config import TrainConfig
from guilomo.training.stages import RouterStageCallback
from guilomo.tuner import context_of

_NAMES = TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
"""transformers 5.23 has renamed the option and warns of the old name."""


class Interrupted(Exception):
    """The run was asked to stop; what was done is saved and can be continued."""


@dataclass
class TrainResult:
    """What fine-tuning did.

    Attributes:
        steps, seconds, step_seconds: optimiser steps in all, and time of this process's part of them; None per step
            where all were done before.
        loss_curve: ``(step, mean training loss since the last point)``; the last point is the last step.
        health: router health by module; empty where nothing is routed.
    """

    steps: int
    seconds: float
    step_seconds: float | None
    loss_curve: list[tuple[int, float]]
    health: dict[str, RouterHealth]


def training_arguments(config: TrainConfig, folder: Path, seed: int, use_cpu: bool = False) -> TrainingArguments:
    """Trainer's arguments for `config`; `use_cpu` keeps Trainer from moving the model to an accelerator."""
    checkpointing: dict[str, Any] = {_CHECKPOINTING: config.gradient_checkpointing}
    arguments = TrainingArguments(
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
        **checkpointing,
        # Every step is logged, for only what is logged survives in a checkpoint; `loss_curve` thins it out.
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.save_every,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        use_cpu=use_cpu,
        # Pinned memory needs an accelerator; without one torch warns at every epoch.
        dataloader_pin_memory=torch.cuda.is_available() and not use_cpu,
    )
    if arguments.n_gpu > 1:
        # Trainer would wrap the model in DataParallel, whose replicas share no routing context.
        arguments._n_gpu = 1
    return arguments


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
        model: a PeftModel. task: its rows. folder: for the checkpoint, ``training.safetensors``.
        seed: of data order and dropout. progress: called as (step, steps, text).
        should_stop: asked after every step; when true a checkpoint is written and `Interrupted` raised.

    Raises:
        DivergedError: the loss or its gradient is not finite.
        GuilomoError: the checkpoint is damaged, was made with other settings, or cannot be written.
        Interrupted: see `should_stop`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        trainer = _trainer(model, task, config, Path(folder), Path(scratch), seed)
        trainer.add_callback(ProgressCallback(progress, should_stop))
        before = trainer.last_state()
        started, state = time.perf_counter(), before
        if before.global_step and before.global_step >= before.max_steps:
            # Trainer would take one more step from the checkpoint of the last one.
            trainer.load_weights()
            trainer.health.restore(Path(str(trainer.unpacked(before))))
        else:
            trainer.train(resume_from_checkpoint=trainer.unpacked(before))
            state = trainer.state
        seconds = time.perf_counter() - started
    if state.global_step < state.max_steps:
        raise Interrupted(f"Training stopped at step {state.global_step} of {state.max_steps}.")
    done = state.global_step - before.global_step
    curve = loss_curve([float(log["loss"]) for log in state.log_history if "loss" in log], config.log_every)
    return TrainResult(state.global_step, seconds, seconds / done if done else None, curve, trainer.health.health)


def _trainer(model: nn.Module, task: Task, config: TrainConfig, folder: Path, scratch: Path, seed: int) -> FileTrainer:
    health = RouterHealthCallback(context_of(model.get_base_model()), config.log_every)  # type: ignore[operator]
    stages = RouterStageCallback()
    trainer = FileTrainer(
        folder / "training.safetensors",
        _identity(model, task, config, seed),
        health,
        stages,
        model=model,
        args=training_arguments(config, scratch, seed, next(model.parameters()).device.type == "cpu"),
        train_dataset=[*task.train, *task.held_out] if config.use_held_out else task.train,
        data_collator=task.collate,
        callbacks=[health, FiniteLossCallback(), RouterBiasCallback(), stages],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _identity(model: nn.Module, task: Task, config: TrainConfig, seed: int) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    adapter: Any = model.peft_config[model.active_adapter]  # type: ignore[index]
    return {
        **config.model_dump(mode="json"),
        "seed": seed,
        "data_hash": task.data_hash,
        "allocation": getattr(adapter, "allocation", None),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def loss_curve(losses: list[float], every: int) -> list[tuple[int, float]]:
    """``(step, mean loss since the last point)`` at every multiple of `every` and at the last step."""
    parts = [losses[start : start + every] for start in range(0, len(losses), every)]
    return [(i * every + len(part), sum(part) / len(part)) for i, part in enumerate(parts)]
