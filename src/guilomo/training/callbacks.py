"""Trainer callbacks: router health, progress, stopping on request or on a loss that is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from guilomo.errors import GuilomoError
from guilomo.layers import RouterHealth, first_non_finite, remedy, router_health
from guilomo.layers.balance import RouterStatistics
from guilomo.layers.finite import NOWHERE
from guilomo.tuner import RoutingContext

Progress = Callable[[int, int, str], None]

HEALTH_FILE = "router_health.json"
"""In a checkpoint's folder: what the routers did since the last reading, and that reading."""


class RouterHealthCallback(TrainerCallback):
    """Records how the routers share the load, for logs and for the report.

    With any Trainer: ``trainer.add_callback(RouterHealthCallback(context_of(base_model)))``. Every log then has
    ``router_load_entropy`` (mean over modules; 1 is even, 0 is collapse) and ``router_dead_experts``. After training,
    `health` holds every module's `RouterHealth` over the steps between the last two readings.

    Args:
        context: of the base model.
        every: steps between readings; unset: a reading at every log.

    What was counted since the last reading is saved with every checkpoint, so that a continued training reads the
    same numbers.
    """

    def __init__(self, context: RoutingContext, every: int | None = None) -> None:
        self.context = context
        self.every = every
        self.health: dict[str, RouterHealth] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.context.record = True
        self.context.statistics.clear()
        if state.global_step:
            self.restore(_checkpoint(args, state), args.device)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _checkpoint(args, state)
        if state.is_world_process_zero and folder.is_dir():
            (folder / HEALTH_FILE).write_text(json.dumps(self.content()), encoding="utf-8")

    def content(self) -> dict[str, Any]:
        """What `restore` reads from `HEALTH_FILE`, JSON-ready."""
        counted = {name: _numbers(s) for name, s in self.context.statistics.items()}
        return {"counted": counted, "health": {name: h.to_dict() for name, h in self.health.items()}}

    def restore(self, checkpoint: Path, device: torch.device | None = None) -> None:
        """Takes up the counts and the last reading of a checkpoint, if it has them."""
        if not (checkpoint / HEALTH_FILE).is_file():
            return
        saved = json.loads((checkpoint / HEALTH_FILE).read_text(encoding="utf-8"))
        counted = {name: _statistics(numbers, device) for name, numbers in saved["counted"].items()}
        self.context.statistics.update(counted)
        self.health = {
            name: RouterHealth(tuple(h["load"]), h["load_entropy"], h["token_entropy"], tuple(h["dead"]))
            for name, h in saved["health"].items()
        }

    def _due(self, state: TrainerState) -> bool:
        """Whether to read now; a training shorter than the distance between readings is read at its end."""
        if self.every is None or state.global_step % self.every == 0:
            return True
        return not self.health and state.global_step >= state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.context.statistics or not self._due(state):
            return
        self.health = {name: router_health(s) for name, s in self.context.statistics.items()}
        self.context.statistics.clear()
        found = {
            "router_load_entropy": sum(h.load_entropy for h in self.health.values()) / len(self.health),
            "router_dead_experts": float(sum(len(h.dead) for h in self.health.values())),
        }
        # Trainer has copied the log into its history before it asks the callbacks.
        for target in (logs, state.log_history[-1] if state.log_history else None):
            if target is not None:
                target.update(found)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.context.record = False


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint of the present step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _numbers(statistics: RouterStatistics) -> dict[str, Any]:
    return {f.name: getattr(statistics, f.name).tolist() for f in fields(statistics)}


def _statistics(numbers: dict[str, Any], device: torch.device | None) -> RouterStatistics:
    return RouterStatistics(**{name: torch.tensor(value, device=device) for name, value in numbers.items()})


class DivergedError(GuilomoError):
    """The training loss or its gradient is not finite."""


class FiniteLossCallback(TrainerCallback):
    """Stops the training before an update by a loss or a gradient that is not finite, with a `DivergedError`.

    The error names the step, the module where that arose (the batch is run once more to find it), and what to lower.

    Args:
        group: what the user calls the group of `learning_rate` and `max_grad_norm`.
    """

    def __init__(self, group: str = "train") -> None:
        self.group = group
        self.passes: list[tuple[dict[str, Any], Tensor]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hook = kwargs["model"].register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, model: nn.Module, args: Any, inputs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled() and isinstance(output, dict) and output.get("loss") is not None:
            self.passes.append((inputs, output["loss"].detach()))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.passes.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:  # the gradient scaler meets infinite gradients by design, and skips their step
            return
        model = kwargs["model"]
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        # One look at the device for all of them.
        *losses, size = torch.stack([*(loss for _, loss in self.passes), norm]).tolist()
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad or not math.isfinite(size):
            said = f"training loss was {losses[bad[0]]}" if bad else f"gradient norm was {size}"
            where = self._where(model, bad)
            advice = remedy(self.group, args.learning_rate, args.max_grad_norm, model)
            raise DivergedError(f"The {said} at step {state.global_step + 1}, {where}. {advice}")

    def _where(self, model: nn.Module, bad: list[int]) -> str:
        """Among the micro-batches of the step, the first at fault; all are tried where only the gradient is."""
        self.hook.remove()
        found = NOWHERE
        for inputs, _ in [self.passes[i] for i in bad[:1]] or self.passes:
            if found == NOWHERE:
                found = first_non_finite(model, lambda inputs=inputs: model(**inputs)["loss"])  # type: ignore[misc]
        return found

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hook.remove()


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
