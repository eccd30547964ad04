"""Reads adapter folders, and says which file of a broken one is at fault."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from torch import nn

from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.tuner import LoraMoeConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_WEIGHTS = "adapter_model.bin"
"""What older versions of PEFT wrote."""


def adapter_folder(text: str) -> Path:
    """The folder of a complete adapter.

    Raises:
        GuilomoError: a file of it is missing or damaged.
    """
    folder = Path(text)
    if not (folder / CONFIG).is_file():
        raise invalid("--adapter", text, f"a folder with {CONFIG}", "guilomo train prints such a folder.")
    adapter_config(folder)
    _check_weights(folder)
    return folder


def adapter_config(folder: Path) -> PeftConfig:
    """The configuration of an adapter.

    Raises:
        GuilomoError: its file is damaged, or of a method that is not known.
    """
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GuilomoError(f"{path} is not readable as JSON ({error}). {_again()}") from None
    if not isinstance(content, dict):
        raise GuilomoError(f"{path} holds a {type(content).__name__}; expected a mapping of keys to values. {_again()}")
    known = [str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    if content.get("peft_type") not in known:
        raise unknown(f"{path}: peft_type", str(content.get("peft_type")), known)
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
        # Reading the plan checks it.
        if isinstance(config, LoraMoeConfig) and config.plan is None:
            raise GuilomoError(f"it carries no allocation. {_again()}")
    except GuilomoError as error:
        raise GuilomoError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise GuilomoError(f"{path} is not usable: {error}. {_again()}") from error
    return config


def load_adapter(model: nn.Module, adapter: Path) -> PeftModel:
    """The model with an adapter from a folder.

    Raises:
        GuilomoError: the adapter is of another model or task.
    """
    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        if isinstance(error, GuilomoError):
            raise
        raise GuilomoError(
            f"--adapter = {str(adapter)!r} does not fit the recipe's model and task: {str(error).splitlines()[0]} "
            "Give the recipe that the adapter was trained with."
        ) from error


def _check_weights(folder: Path) -> None:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / OTHER_WEIGHTS).is_file():
            return
        # PEFT would look for a model of this name on the Hub.
        raise GuilomoError(f"{path} is missing: the folder has a configuration but no weights. {_again()}")
    try:
        with safe_open(str(path), framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise GuilomoError(f"{path} is damaged ({error}). {_again()}") from error


def _again() -> str:
    return "Copy the whole adapter folder again, or train it again with guilomo train."
