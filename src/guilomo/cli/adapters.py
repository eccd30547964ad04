"""Reads adapter folders, and says which file of a broken one is at fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel, XLoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from guilomo.adapters import load_xlora
from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.files import check_adapter
from guilomo.layers.routers import router_class
from guilomo.tuner import LoraMoeConfig

CONFIG = "adapter_config.json"


def adapter_folder(text: str) -> Path:
    """The folder of a complete adapter.

    Raises:
        GuilomoError: a file of it is missing, pickled or damaged.
    """
    folder = Path(text)
    if not (folder / CONFIG).is_file():
        raise invalid("--adapter", text, f"a folder with {CONFIG}", "guilomo train prints such a folder.")
    adapter_config(folder)
    check_adapter(folder)
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


def load_adapter(model: nn.Module, adapter: Path, argument: str = "--adapter", parts: Sequence[str] = ()) -> PeftModel:
    """The model with an adapter from a folder, which the user gave as `argument`.

    Args:
        parts: names of the tasks that it is to be used on, where several are one, in the order of their ids.

    Raises:
        GuilomoError: the adapter is of another model or task, or knows the parts by other ids.
    """
    try:
        config = adapter_config(adapter)
        if isinstance(config, XLoraConfig):
            return load_xlora(model, adapter)
        if isinstance(config, LoraMoeConfig):
            _refuse_other_ids(config, list(parts))
        return PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        if isinstance(error, GuilomoError):
            raise
        raise GuilomoError(
            f"{argument} = {str(adapter)!r} does not fit the recipe's model and task: {str(error).splitlines()[0]} "
            "Give the recipe that the adapter was trained with."
        ) from error


def _refuse_other_ids(config: LoraMoeConfig, parts: list[str]) -> None:
    """Routers that read tasks know them by their ids, and a head of joint classes has each task's in their place."""
    trained = config.task_names
    by_place = "task" in router_class(config.router).reads or config.task_type == "SEQ_CLS"
    if trained and parts and by_place and parts != trained[: len(parts)]:
        remedy = "Give them in the order in which the adapter was trained."
        raise invalid("task.parts", parts, f"{trained}, or the first of them", remedy)


def _again() -> str:
    return "Copy the whole adapter folder again, or train it again with guilomo train."
