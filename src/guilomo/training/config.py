"""Options of fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainConfig(BaseModel):
    """How every method is fine-tuned. Field descriptions are the CLI's help."""

    model_config = ConfigDict(extra="forbid")

    epochs: float = Field(3.0, gt=0, description="Passes over the training rows; ignored when max_steps is set.")
    max_steps: int | None = Field(None, ge=1, description="Optimiser steps, instead of epochs.")
    batch_size: int = Field(16, ge=1, description="Rows per device and micro-batch.")
    accumulation: int = Field(1, ge=1, description="Micro-batches per optimiser step. More: less memory, same batch.")
    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW, the same for every method.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="Of the learning rate after warm-up."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Clips the gradient norm; 0: no clipping.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third more time.")
    use_held_out: bool = Field(
        True, description="Train every method on the held-out rows too; they only steer the search."
    )
    save_every: int = Field(
        1,
        ge=1,
        description="Steps between checkpoints; a killed run repeats at most that many. A save costs about 1 % of a "
        "step of MiniLM on a CPU; raise this where it costs more.",
    )
    log_every: int = Field(10, ge=1, description="Steps between points of the loss curve.")
    start_from_search: bool = Field(
        False, description="Start the searched mixture from the selected experts' weights instead of fresh ones."
    )
