"""A mixture at given gates as an adapter folder of PEFT's LoRA, which loads without guilomo."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from guilomo.errors import invalid
from guilomo.export.factors import Factors, padded, stacked, truncated
from guilomo.export.gates import mixture_config, mixture_layers, refuse_unlike_lora
from guilomo.tuner import LoraMoeConfig


@dataclass(frozen=True)
class LoraExport:
    """A plain LoRA adapter. Its alpha equals its rank everywhere, so every scale is 1: gates and scales lie in B.

    Attributes:
        config: PEFT's configuration.
        factors: the change of each module, float64.
        energy: share of each module's squared Frobenius norm that is kept; 1 where nothing was cut.
        others: what else the adapter holds, such as a classification head, by PEFT's names.
        dtype: of the saved factors.
    """

    config: LoraConfig
    factors: dict[str, Factors]
    energy: dict[str, float]
    others: dict[str, Tensor]
    dtype: torch.dtype

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of the adapter, by PEFT's names."""
        state = dict(self.others)
        for name, pair in self.factors.items():
            for letter, factor in (("A", pair.a), ("B", pair.b)):
                state[f"base_model.model.{name}.lora_{letter}.weight"] = factor.to(self.dtype)
        return {key: value.detach().cpu().contiguous() for key, value in state.items()}

    def save(self, folder: str | Path) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors``."""
        self.config.save_pretrained(str(folder))
        save_file(self.state_dict(), Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def plain_lora(
    model: PeftModel, gates: Mapping[str, Tensor], rank: int | None = None, uniform_rank: bool = False
) -> LoraExport:
    """The active mixture as plain LoRA with its gates frozen (ours).

    Args:
        model: the adapted model.
        gates: ``(E,)`` by module, see `mean_gates`.
        rank: cut every module to at most this rank by SVD; unset: the experts are stacked, which is exact for `gates`.
        uniform_rank: pad every module with zeros to the highest rank, for servers that know one rank per adapter.

    Raises:
        GuilomoError: the adapter is no mixture, plain LoRA cannot have its structure, or the rank is not between 1 and
            the highest stacked rank.
    """
    refuse_unlike_lora(model)
    layers, adapter = mixture_layers(model), model.active_adapter
    factors = _stacked_modules(model, gates)
    energy = dict.fromkeys(factors, 1.0)
    if rank is not None:
        _check_rank(rank, factors)
        cut = {name: truncated(pair, rank) for name, pair in factors.items()}
        factors, energy = {n: pair for n, (pair, _) in cut.items()}, {n: kept for n, (_, kept) in cut.items()}
    if uniform_rank:
        factors = {name: padded(pair, _highest(factors)) for name, pair in factors.items()}
    transposed = any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values())
    others = {k: v for k, v in get_peft_model_state_dict(model, adapter_name=adapter).items() if ".molora_" not in k}
    dtype = next(iter(layers.values())).molora_A[adapter].dtype
    return LoraExport(_config(mixture_config(model), factors, transposed), factors, energy, others, dtype)


def _stacked_modules(model: PeftModel, gates: Mapping[str, Tensor]) -> dict[str, Factors]:
    adapter, plan = model.active_adapter, mixture_config(model).plan
    assert plan is not None, "an attached adapter has its plan"
    return {
        n: stacked(layer.packed_a(adapter), layer.molora_B[adapter], plan[n].ranks, plan.scales(n), gates[n])
        for n, layer in mixture_layers(model).items()
    }


def _highest(factors: Mapping[str, Factors]) -> int:
    return max(pair.rank for pair in factors.values())


def _check_rank(rank: int, factors: Mapping[str, Factors]) -> None:
    if not 1 <= rank <= _highest(factors):
        raise invalid(
            "rank",
            rank,
            f"a whole number from 1 to {_highest(factors)}, the highest rank that the stacked experts have",
            "At that rank nothing is cut.",
        )


def _config(config: LoraMoeConfig, factors: Mapping[str, Factors], transposed: bool) -> LoraConfig:
    highest = _highest(factors)
    # PEFT matches the end of a name; the anchor keeps a short name from matching a longer one.
    lower = {f"^{re.escape(name)}$": pair.rank for name, pair in factors.items() if pair.rank < highest}
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        target_modules=list(factors),
        # PEFT adds the head of a classifier at every loading.
        modules_to_save=list(dict.fromkeys(config.modules_to_save or ())) or None,
        r=highest,
        lora_alpha=highest,
        rank_pattern=lower,
        alpha_pattern=dict(lower),
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
