"""Writes the golden adapter of the present release: ``python tests/golden/make_golden.py``, once per release.

The folder ``tests/golden/VERSION`` then holds the adapter as it is saved, and in ``golden.safetensors`` the base
model's weights, an input and the outputs. A folder is never written again: later releases must read what is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import guilomo
from guilomo import LoraMoeConfig

HERE = Path(__file__).parent
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
MIXTURE = {"num_experts": 4, "r": 2, "top_k": 2, "scaling": "alpha_over_sqrt_r", "init_lora_weights": False}
RANKS = {"q_proj": [1, 3, 2], "up_proj": [4, 1, 1, 5, 2], "o_proj": [3], "v_proj": []}


def base_model() -> LlamaForCausalLM:
    """The architecture of the golden base model; its weights are in ``golden.safetensors``."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False)).eval()


def make(folder: Path) -> None:
    """Raises: FileExistsError, where the release has its golden adapter already."""
    folder.mkdir()
    torch.manual_seed(0)
    base = base_model()
    weights = {f"base.{name}": tensor.clone() for name, tensor in base.state_dict().items()}
    config = LoraMoeConfig(target_modules="all-linear", rank_pattern=RANKS, task_type="CAUSAL_LM", **MIXTURE)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_B" in name or "molora_router" in name:
                parameter.normal_(std=0.3)  # experts that matter, and routers that decide clearly
        inputs = torch.randint(0, SIZES["vocab_size"], (3, 9))
        logits = model(input_ids=inputs).logits
    model.save_pretrained(folder)
    save_file({**weights, "input_ids": inputs, "logits": logits}, folder / "golden.safetensors")


if __name__ == "__main__":
    make(HERE / guilomo.__version__)
    sys.stdout.write(f"{HERE / guilomo.__version__}\n")
