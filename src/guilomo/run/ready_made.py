"""What a kind of row must say for itself that starts from ready-made things: adapters, or models."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from peft import PeftModel
from pydantic import BaseModel, ValidationError
from torch import nn

from guilomo.allocation import Allocation
from guilomo.errors import GuilomoError, invalid
from guilomo.methods import METHODS
from guilomo.run.config import MethodConfig, RunConfig
from guilomo.run.recipe import problems
from guilomo.tasks.config import expand_path

if TYPE_CHECKING:
    from guilomo.run.pipeline import Run

Options = TypeVar("Options", bound=BaseModel)


@dataclass(frozen=True)
class ReadyMade:
    """A kind of such rows.

    Attributes:
        options: the class of the options of a row.
        check: refuses options that the row cannot have, and things that are not there, before anything is loaded.
        plan: the plan of a row; what has to be chosen or made for it is so once, and kept in the row's folder.
        attach: the model, freshly loaded, with the row's things as one adapter, ready to train; the last argument is
            PEFT's type of the task.
    """

    options: type[BaseModel]
    check: Callable[[MethodConfig, RunConfig], None]
    plan: Callable[[Run, MethodConfig], Allocation]
    attach: Callable[[nn.Module, MethodConfig, RunConfig, str], PeftModel]


def options_of(method: MethodConfig, kind: type[Options]) -> Options:
    """The options of a row; unset ones are those of its method.

    Raises:
        GuilomoError: an option is missing, unknown or not usable.
    """
    known = METHODS[method.strategy]
    called = method.name if method.name == method.strategy else f"{method.name}, strategy: {method.strategy}"
    for needed in known.needs.keys() - method.options.keys():
        raise GuilomoError(
            f"Method {method.name!r} starts from ready-made {known.starts_from}, and options.{needed} does not say "
            f"which. Give a folder that holds their folders: {{name: {called}, options: {{{needed}: FOLDER}}}}. "
            "docs/banks.md tells how to make one."
        )
    try:
        return kind.model_validate({**known.options, **method.options})
    except ValidationError as error:
        raise GuilomoError(f"Method {method.name!r}, options: " + "\n".join(problems(error, kind))) from None


def folders_of(given: str | dict[str, str], option: str, listed: Callable[[Path], dict[str, Path]]) -> dict[str, Path]:
    """The folders by name that an option gives: one that holds them all, or each of them.

    Args:
        given: the value. option: what it is called. listed: finds the folders inside one.
    """
    if isinstance(given, str):
        return listed(expand_path(given, option))
    return {name: expand_path(folder, f"{option}.{name}") for name, folder in given.items()}


def refuse_decided_keys(method: MethodConfig, decided: Collection[str]) -> None:
    """Refuses keys of the row's mixture that the ready-made things decide, which would change nothing.

    Args:
        decided: fields of `LoraMoeConfig`.

    Raises:
        GuilomoError: there is such a key.
    """
    names, known = {"alpha": "lora_alpha"}, METHODS[method.strategy]
    for key, value in method.mixture.items():
        # A recipe may write out what the method has anyway.
        if names.get(key, key) in decided and value != known.mixture.get(key):
            remedy = f"The {known.starts_from} decide it: leave it out."
            raise invalid(f"mixture.{key} of method {method.name!r}", value, "unset", remedy)
