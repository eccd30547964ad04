"""Full models as experts: their names, their folders, and one of them loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from guilomo.errors import GuilomoError, invalid

Model = str | PathLike[str] | nn.Module
Models = Mapping[str, Model] | Sequence[str | PathLike[str]]
"""Folders of models, or models, by the name that each expert is to have; or folders that are called as they are."""

BASE = "base"
"""What expert 0 is called."""


def named_models(experts: Models) -> dict[str, Model]:
    """Models by name, in their order.

    Raises:
        GuilomoError: there are none, or names are missing, equal or that of the base.
    """
    if isinstance(experts, (str, PathLike, nn.Module)):
        raise invalid("experts", experts, "several models", "Give {name: model}, or models_in(folder).")
    if isinstance(experts, Mapping):
        names, models = list(experts), list(experts.values())
    elif any(isinstance(expert, nn.Module) for expert in experts):
        raise invalid("experts", [type(expert).__name__ for expert in experts], "models by name", "Give {name: model}.")
    else:
        names, models = [Path(folder).name for folder in experts], list(experts)
    if not models:
        raise invalid("experts", models, "at least one model")
    if len(set(names)) < len(names) or not all(names) or BASE in names:
        raise invalid(
            "names of experts",
            names,
            f"different names, none of them {BASE!r}, which is expert 0",
            "Give {name: model}.",
        )
    return dict(zip(names, models, strict=True))


def models_in(folder: str | PathLike[str]) -> dict[str, Path]:
    """The model folders directly inside a folder by their names, in alphabetical order.

    Raises:
        GuilomoError: there is no such folder, or no model in it.
    """
    if not Path(folder).is_dir():
        raise invalid("experts", str(folder), "an existing folder of model folders")
    found = {path.parent.name: path.parent for path in sorted(Path(folder).glob("*/config.json"))}
    if not found:
        raise invalid("experts", str(folder), "a folder whose subfolders hold config.json", "Put one model into each.")
    return found


def check_folder(folder: Path, name: str) -> None:
    """Refuses what is no folder of a model with safetensors files.

    Raises:
        GuilomoError: names the expert and its folder.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise invalid(
            f"folder of expert {name!r}",
            str(folder),
            "one with config.json and safetensors files",
            "model.save_pretrained(folder) writes them.",
        )


def loaded(folder: Path, name: str, base: nn.Module) -> tuple[nn.Module, set[str]]:
    """A model of the class and dtype of the base, and which of its weights its checkpoint lacks.

    Raises:
        GuilomoError: it cannot be loaded.
    """
    if not isinstance(base, PreTrainedModel):
        raise invalid(
            "model", type(base).__name__, "a model of transformers where experts are folders", "Give {name: model}."
        )
    check_folder(folder, name)
    kind: Any = type(base)  # from_pretrained is typed without what output_loading_info adds
    try:
        with _quiet():
            model, found = kind.from_pretrained(
                str(folder), dtype=base.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GuilomoError(
            f"Expert {name!r} in {folder} cannot be loaded: {reason} Give a folder in which config.json and weights "
            "belong together."
        ) from error
    return model, set(found["missing_keys"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the report on heads that a checkpoint lacks."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
