"""A trained adapter of a row on disk, whichever library's, and what of its model is trained."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel, XLoraConfig, load_peft_weights, set_peft_model_state_dict
from torch import nn

from guilomo.adapters import restore_xlora, save_xlora
from guilomo.files import check_adapter, save_adapter


def save_trained(model: PeftModel, folder: Path) -> None:
    """Writes the adapter; the folder appears whole or not at all."""
    save_adapter(model, folder, save_xlora if _is_xlora(model) else PeftModel.save_pretrained)


def load_trained(model: PeftModel, folder: Path) -> None:
    """Puts a saved adapter's weights into a model that has the same adapter attached."""
    check_adapter(folder)
    if _is_xlora(model):
        restore_xlora(model, folder)
    else:
        device = str(next(model.parameters()).device)
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device=device))


def trained_parameters(model: nn.Module) -> int:
    """How many numbers are trained; heads and other modules trained whole are not counted, nor are they in a budget."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in n)


def _is_xlora(model: PeftModel) -> bool:
    return isinstance(model.peft_config[model.active_adapter], XLoraConfig)
