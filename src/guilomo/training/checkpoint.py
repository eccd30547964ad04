"""A Trainer whose checkpoint is one small file, cheap enough to be written after every step."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState

from guilomo.files import (
    flat,
    load_state,
    optimizer_tensors,
    random_tensors,
    refuse_other,
    restore_optimizer,
    restore_random,
    save_state,
    unflat,
)
from guilomo.training.callbacks import HEALTH_FILE, RouterHealthCallback
from guilomo.training.stages import START_FILE, RouterStageCallback
from guilomo.tuner.biases import biased_routers

STATE_FILE = "trainer_state.json"
"""Where Trainer looks for the step to continue from."""
START = "start: "
"""Before the names of experts whose start a stage keeps."""


class FileTrainer(Trainer):
    """Saves what decides the steps to come in one safetensors file, in place of Trainer's folder of pickles.

    The file holds the trained weights, the optimiser, the schedule, the random numbers, the losses so far and the
    router statistics. It replaces the one before it in one step, so a process killed at any moment leaves a whole one.

    Args:
        file: the checkpoint.
        identity: settings under which alone a checkpoint may be continued, JSON-ready.
        health: the callback whose counts are kept. stages: the one that knows where the experts started.
        options: as for Trainer; `args.output_dir` is a scratch folder.
    """

    # Trainer declares them optional, but has them while it trains.
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        file: Path,
        identity: dict[str, Any],
        health: RouterHealthCallback,
        stages: RouterStageCallback,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.file, self.identity, self.health, self.stages = file, identity, health, stages
        self.saved: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {})

    def last_state(self) -> TrainerState:
        """The state in the checkpoint, and the empty one if there is none.

        Raises:
            GuilomoError: the checkpoint is damaged, or was made with other settings.
        """
        if not self.file.exists():
            return TrainerState()
        self.saved = load_state(self.file)
        tensors, facts = self.saved
        refuse_other(self.file, facts["identity"], self.identity)
        losses = [{"loss": loss, "step": step} for step, loss in enumerate(tensors["losses"].tolist(), start=1)]
        return TrainerState(**facts["state"], log_history=losses)

    def unpacked(self, state: TrainerState) -> str | None:
        """A folder with what Trainer and the callbacks read on resume; None if there is nothing to continue."""
        if not state.global_step:
            return None
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True)
        state.save_to_json(str(folder / STATE_FILE))
        (folder / HEALTH_FILE).write_text(json.dumps(self.saved[1]["health"]), encoding="utf-8")
        start = {name.removeprefix(START): t for name, t in self.saved[0].items() if name.startswith(START)}
        if start:
            save_state(folder / START_FILE, start, {})
        return str(folder)

    def load_weights(self) -> None:
        """Puts the checkpoint's weights into the model."""
        weights = self._weights()
        with torch.no_grad():
            for parameter, saved in zip(weights, unflat(self.saved[0]["weights"], _shapes(weights)), strict=True):
                parameter.copy_(saved)

    def _weights(self) -> list[Tensor]:
        """What training changes: trained parameters, and the biases of routers that are balanced without a loss."""
        biases = [router.bias for router in biased_routers(self.model)]
        return [*(p for p in self.model.parameters() if p.requires_grad), *biases]

    # The four places where Trainer saves and reads a checkpoint.

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        losses = [log["loss"] for log in self.state.log_history if "loss" in log]
        tensors = {"weights": flat(self._weights()), "losses": torch.tensor(losses, dtype=torch.float64)}
        tensors |= optimizer_tensors(self.optimizer, "optimizer") | random_tensors(self.args.device)
        tensors |= {f"{START}{name}": tensor for name, tensor in self.stages.start.items()}
        kept = [f.name for f in fields(self.state) if f.name != "log_history"]
        facts = {
            "identity": self.identity,
            "state": {name: getattr(self.state, name) for name in kept},
            "schedule": self.lr_scheduler.state_dict(),
            "health": self.health.content(),
        }
        if self.args.should_save:
            save_state(self.file, tensors, facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_weights()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tensors, facts = self.saved
        restore_optimizer(self.optimizer, tensors, "optimizer")
        self.lr_scheduler.load_state_dict(facts["schedule"])
        # The schedule sets the rate only when it next steps.
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random(self.saved[0], self.args.device)


def _shapes(tensors: list[Tensor]) -> list[torch.Size]:
    return [t.shape for t in tensors]
