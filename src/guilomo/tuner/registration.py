"""Makes PEFT know the tuner. Runs once, when `guilomo` is imported."""

from __future__ import annotations

from typing import Any

from peft import mapping

from guilomo.errors import GuilomoError
from guilomo.tuner.config import LoraMoeConfig, MoloraType
from guilomo.tuner.model import LoraMoeModel


def register() -> None:
    """Writes the tuner into PEFT's look-up tables; doing so twice changes nothing.

    PEFT's public ``register_peft_method`` accepts only names that its own enum has, so the tables are written
    directly (PEFT >= 0.21.0).

    Raises:
        GuilomoError: PEFT already has another method of this name.
    """
    kind: Any = MoloraType.MOLORA
    known = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is LoraMoeConfig:
        return
    if known is not None:
        raise GuilomoError(
            f"PEFT already has a method called {kind.value} ({known.__module__}.{known.__name__}). "
            "Install a version of guilomo that supports this version of PEFT."
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = LoraMoeConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = LoraMoeModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = LoraMoeModel.prefix
