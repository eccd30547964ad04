"""Small helpers of the tuner's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from guilomo import LoraMoeConfig


def attach(model: nn.Module, adapter: str = "default", **options: Any) -> PeftModel:
    """A mixture whose experts already matter: B starts random unless the options say otherwise."""
    given = {"num_experts": 3, "r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(model, LoraMoeConfig(**given), adapter_name=adapter)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The outputs in evaluation mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def train_a_step(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """One step of SGD large enough to be seen; returns the loss before it."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(**inputs).loss
    loss.backward()
    torch.optim.SGD(trained, lr=0.5).step()
    model.zero_grad()
    return float(loss.detach())


def reload(base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    return PeftModel.from_pretrained(base, str(folder), **options)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of everything trained, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
