"""Reads a LoRA adapter folder of PEFT: the low-rank factors of every module, each with its own scale."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor

from guilomo.adapters.plain import refuse_special
from guilomo.errors import GuilomoError, invalid
from guilomo.files import check_adapter
from guilomo.files.adapter import WEIGHTS

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT writes before the name of every module."""
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])\.weight")


@dataclass(frozen=True)
class LoraPair:
    """The change ``scale * b @ a`` of one linear.

    Attributes:
        a: ``(r, I)``; b: ``(O, r)``, both as saved. scale: ``alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA).
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoraAdapter:
    """One adapter as it lies on disk.

    Attributes:
        name: what it is called here. folder: where it lies. config: PEFT's.
        pairs: the changes by module, in the order of the file.
        others: what else was saved, by the base model's names: modules trained whole, and copies of embeddings.
    """

    name: str
    folder: Path
    config: LoraConfig
    pairs: dict[str, LoraPair]
    others: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        """Of the low-rank factors."""
        return sum(pair.a.numel() + pair.b.numel() for pair in self.pairs.values())


def read_adapter(folder: str | Path, name: str | None = None) -> LoraAdapter:
    """Reads one adapter of PEFT's LoRA, on the CPU and without the base model.

    Only safetensors are read. The scale of a module follows PEFT's rule: the first key of `rank_pattern` (or
    `alpha_pattern`) that matches the end of its name, or else `r` (or `lora_alpha`).

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: what to call it; unset: the folder's name.

    Raises:
        GuilomoError: a file is missing, damaged or a pickle; the adapter is not LoRA, or is more than low-rank changes
            of linears (DoRA, trained biases, embeddings, convolutions, ...); weights and configuration disagree.
    """
    folder = Path(folder)
    name = name if name is not None else folder.name
    where = f"adapter {name!r}"
    config = read_config(folder, where)
    refuse_special(where, config)
    check_adapter(folder)
    factors: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        found = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if found:
            factors.setdefault(found["module"], {})[found["letter"]] = tensor
        elif ".lora_" in key:
            raise invalid(f"{where}: {key}", tuple(tensor.shape), "lora_A and lora_B of linear modules", _ONLY_LINEARS)
        else:
            others[key.removeprefix(PREFIX)] = tensor
    if not factors:
        raise GuilomoError(f"{where} ({folder}) changes no module, so there is nothing to make an expert of.")
    pairs = {module: _pair(where, module, pair, config) for module, pair in factors.items()}
    return LoraAdapter(name, folder, config, pairs, others)


_ONLY_LINEARS = "Experts are changes of linear modules: train the adapter without embeddings and convolutions."


def read_config(folder: Path, where: str) -> LoraConfig:
    """The configuration of a LoRA adapter.

    Raises:
        GuilomoError: there is none, it is damaged, or it is that of another method.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise invalid(
            where,
            str(folder),
            f"a folder with {CONFIG}",
            "Adapters of the Hub have to be downloaded first, for example: hf download NAME --local-dir FOLDER.",
        )
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        kind = content["peft_type"]
        config: LoraConfig | None = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (KeyError, TypeError, ValueError) as error:
        raise GuilomoError(
            f"{path} is not the configuration of an adapter ({error}). Copy the folder again."
        ) from error
    if config is None:
        remedy = "Give the LoRA adapters that it was made of." if kind in ("MOLORA", "XLORA") else _CONVERT
        raise invalid(f"{where}: peft_type", kind, "'LORA'", remedy)
    return config


_CONVERT = "Convert it to LoRA where peft.convert_to_lora supports that."


def _pair(where: str, module: str, factors: dict[str, Tensor], config: LoraConfig) -> LoraPair:
    if factors.keys() != {"A", "B"}:
        missing = "AB".replace(next(iter(factors)), "")
        raise GuilomoError(f"{where}: module {module!r} lacks lora_{missing}. Copy the whole adapter folder again.")
    a, b = factors["A"], factors["B"]
    if a.dim() != 2 or b.dim() != 2:
        raise invalid(f"{where}: shape of {module!r}", tuple(a.shape), "(r, I), that of a linear", _ONLY_LINEARS)
    rank = _by_pattern(config.rank_pattern, module, config.r)
    alpha = _by_pattern(config.alpha_pattern, module, config.lora_alpha)
    if not rank == a.shape[0] == b.shape[1]:
        raise invalid(
            f"{where}: rank of {module!r}",
            (a.shape[0], b.shape[1]),
            f"{rank}, as {CONFIG} says",
            "Weights and configuration are not of one adapter: copy the whole folder again.",
        )
    return LoraPair(a, b, alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _by_pattern(pattern: dict[str, Any] | None, module: str, usual: Any) -> Any:
    """The value that PEFT takes for a module."""
    return (pattern or {}).get(get_pattern_key(list(pattern or ()), module), usual)
