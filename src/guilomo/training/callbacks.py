"""Trainer callbacks: router health, progress, stopping on request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guilomo.layers import RouterHealth, router_health
from guilomo.tuner import RoutingContext

Progress = Callable[[int, int, str], None]


class RouterHealthCallback(TrainerCallback):
    """Records how the routers share the load, for logs and for the report.

    With any Trainer: ``trainer.add_callback(RouterHealthCallback(context_of(base_model)))``. Every log then has
    ``router_load_entropy`` (mean over modules; 1 is even, 0 is collapse) and ``router_dead_experts``. After training,
    `health` holds every module's `RouterHealth` over the steps since the last log.
    """

    def __init__(self, context: RoutingContext) -> None:
        self.context = context
        self.health: dict[str, RouterHealth] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.context.record = True
        self.context.statistics.clear()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.context.statistics:
            return
        self.health = {name: router_health(s) for name, s in self.context.statistics.items()}
        self.context.statistics.clear()
        if logs is not None:
            logs["router_load_entropy"] = sum(h.load_entropy for h in self.health.values()) / len(self.health)
            logs["router_dead_experts"] = float(sum(len(h.dead) for h in self.health.values()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.context.record = False


class ProgressCallback(TrainerCallback):
    """Reports every step to a progress function, and stops with a checkpoint when asked to."""

    def __init__(self, progress: Progress | None, should_stop: Callable[[], bool] | None) -> None:
        self.progress = progress
        self.should_stop = should_stop
        self.loss = ""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, self.loss)
        if self.should_stop is not None and self.should_stop():
            control.should_save = True
            control.should_training_stop = True
        return control
