"""Small banks of LoRA adapters on disk, and mixtures that are told what to choose."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from guilomo.tuner import LoraMoeLayer, SelectionMasks
from tiny_models import build

MIXED: dict[str, dict[str, Any]] = {
    "math": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "code": {"r": 4, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "lm_head"]},
    "law": {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5},
        "alpha_pattern": {"o_proj": 11},
    },
}
"""Three adapters for the tiny Llama: other ranks, scales, patterns and modules."""


def save_adapter(folder: Path, base: str = "llama", seed: int = 0, **options: Any) -> Path:
    """A LoRA adapter whose B is not zero."""
    torch.manual_seed(seed)
    given = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(build(base).double(), LoraConfig(**given))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return save(model, folder)


def save_bank(folder: Path, adapters: dict[str, dict[str, Any]] = MIXED, base: str = "llama") -> dict[str, Path]:
    """A folder of adapters by name."""
    return {n: save_adapter(folder / n, base, seed, **options) for seed, (n, options) in enumerate(adapters.items())}


def save_bank_of(model: nn.Module, folder: Path, adapters: dict[str, dict[str, Any]]) -> Path:
    """A folder of adapters for a given model, whose heads, where they have some, are the model's."""
    for seed, (name, options) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        given = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "lora_alpha": 8, **options}
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**given))
        for key, parameter in adapted.named_parameters():
            if ".lora_" in key:
                nn.init.normal_(parameter, std=0.3)
        save(adapted, folder / name)
    return folder


def alone(folder: Path, base: str = "llama") -> PeftModel:
    """The tiny model in float64 with one adapter, as PEFT loads it."""
    return PeftModel.from_pretrained(build(base).double(), str(folder)).eval()


def send_everything_to(model: PeftModel, expert: int) -> None:
    """One-hot gates in every module: what is added to the logits leaves the others a weight of exactly 0."""
    for name, layer in mixtures(model).items():
        if "default" in layer.molora_router:
            log_expert = torch.full((layer.molora_layout["default"].experts,), -1e4)
            log_expert[expert] = 0
            layer.context.masks[name] = SelectionMasks(log_expert, None)


def save(model: PeftModel, folder: Path) -> Path:
    """As PEFT does, without its note that it saves the embeddings beside an adapted output layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        model.save_pretrained(folder)
    return folder


def replace_adapter(folder: Path) -> None:
    """As a user does who trains it again into the same folder: equal shapes and configuration, other weights."""
    path = folder / "adapter_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(path).items()}, path)


def mixtures(model: nn.Module) -> dict[str, LoraMoeLayer]:
    return {m.name: m for m in model.modules() if isinstance(m, LoraMoeLayer)}
