"""Feed-forwards of other architectures are found by their names: equal experts are one LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from adapter_tools import attach, logits
from guilomo.tuner import FeedForwardLayer
from tiny_models import build

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _distilbert() -> nn.Module:
    config = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4, pad_token_id=0)
    return DistilBertForSequenceClassification(config)


def _opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64))


MODELS = {
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, max_position_embeddings=64)),
    "distilbert": _distilbert,
    "opt": _opt,
    "mistral": lambda: build("mistral"),
    "qwen2": lambda: build("qwen2"),
    "qwen3": lambda: build("qwen3"),
}


def _build(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]().eval()


def _inputs() -> dict[str, Tensor]:
    tokens = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(2))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("name", MODELS)
def test_equal_experts_are_one_lora(name: str) -> None:
    model = attach(_build(name).double(), feed_forward_experts=True, num_experts=3).double()
    one = attach(_build(name).double(), num_experts=1, top_k=1).double()
    blocks = {m.molora_plan["default"].block for m in model.modules() if isinstance(m, FeedForwardLayer)}
    assert len(blocks) == 2
    there = dict(one.named_modules())
    with torch.no_grad():
        for key, layer in model.named_modules():
            if hasattr(layer, "molora_A"):
                copies = layer.molora_layout["default"].experts
                layer.molora_A["default"].copy_(there[key].molora_A["default"].repeat(copies, 1))
                layer.molora_B["default"].copy_(there[key].molora_B["default"].repeat(1, copies))
    found, wanted = logits(model, _inputs()), logits(one, _inputs())
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-8)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, _inputs()), wanted, rtol=1e-3)
