"""Tiny random models of the architectures the tuner must work with, and inputs for them.

Hidden size 32 and two layers; dropout is off, so that equal inputs give equal outputs in training mode too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 64
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}


def llama(**options: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**_DECODER, **options}))


def mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=8))


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**_DECODER))


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=8))


def gemma() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**_DECODER, head_dim=8))


def gpt2() -> nn.Module:
    """Its linears are transformers' `Conv1D`, whose weight is stored transposed."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**_ENCODER, vocab_size=VOCABULARY, max_position_embeddings=64))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**_ENCODER, image_size=8, patch_size=4, num_channels=3))


DECODERS = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gemma": gemma, "gpt2": gpt2}
CLASSIFIERS = {"bert": bert, "vit": vit}
ARCHITECTURES = {**DECODERS, **CLASSIFIERS}


def build(name: str) -> nn.Module:
    """The tiny model of an architecture; the same weights every time."""
    torch.manual_seed(1)
    return ARCHITECTURES[name]()


def inputs_for(name: str, rows: int = 3) -> dict[str, Tensor]:
    """A labelled batch with padding, where the architecture has any; the same every time."""
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        pixels = torch.randn(rows, 3, 8, 8, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % 3}
    tokens = torch.randint(3, VOCABULARY, (rows, 7), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 5:] = 0
    if name == "bert":
        return {"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(rows) % 3}
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
