"""Fields of `LoraMoeConfig` that experts decide which are there before the mixture."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from guilomo.errors import invalid, unknown
from guilomo.tuner.config import LoraMoeConfig

DECIDED_BY_EXPERTS = frozenset(
    {
        "num_experts",
        "r",
        "lora_alpha",
        "scaling",
        "rank_pattern",
        "allocation",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "expert_names",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "peft_type",
        "auto_mapping",
    }
)
"""By any kind of them."""


def refuse_decided(options: Mapping[str, Any], decided: Collection[str], by: str) -> None:
    """Refuses options that are no fields, or fields that are not open.

    Args:
        by: by what they are decided, in words.

    Raises:
        GuilomoError: names the option.
    """
    fields = set(LoraMoeConfig.__dataclass_fields__)
    for name, value in options.items():
        if name in decided:
            raise invalid(name, value, f"unset: it follows from {by}")
        if name not in fields:
            raise unknown("option", name, fields - set(decided))
