"""Strategies by name, for recipes and the command line."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from guilomo.allocation.chance import random_plan
from guilomo.allocation.hilo import hilo
from guilomo.allocation.layerwise import Shapes, Terms
from guilomo.allocation.learned import learned
from guilomo.allocation.mola import mola
from guilomo.allocation.normal import normal
from guilomo.allocation.plan import Allocation
from guilomo.allocation.rules import rules
from guilomo.allocation.spectral import alphalora
from guilomo.allocation.uniform import lora, uniform
from guilomo.errors import GuilomoError, invalid, unknown

STRATEGIES: Mapping[str, Callable[..., Allocation]] = {
    "uniform": uniform,
    "lora": lora,
    "mola": mola,
    "normal": normal,
    "hilo": hilo,
    "alphalora": alphalora,
    "random": random_plan,
    "rules": rules,
    "learned": learned,
}
"""Each takes `shapes` and keyword options, and returns an Allocation."""


def strategy_options(name: str) -> dict[str, Any]:
    """The options a strategy accepts, with their defaults (None for those that `fit` defines).

    Raises:
        GuilomoError: no such strategy.
    """
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES)
    parameters = inspect.signature(STRATEGIES[name]).parameters.values()
    own = {option.name: option.default for option in parameters if option.kind is not option.VAR_KEYWORD}
    own.pop("shapes")
    return {**dict.fromkeys(Terms.__annotations__), **own}


def make(name: str, shapes: Shapes, **options: Any) -> Allocation:
    """Calls the strategy `name` with `options`.

    Raises:
        GuilomoError: an unknown strategy or option (the nearest is proposed), a missing one, one of a type that the
            strategy cannot use, or as the strategy.
    """
    accepted = strategy_options(name)
    for option in options:
        if option not in accepted:
            raise unknown(f"option of strategy {name!r}", option, accepted)
    for option, value in accepted.items():
        if value is inspect.Parameter.empty and option not in options:
            raise invalid(f"option {option!r} of strategy {name!r}", None, "a value", f"Give {option}=...")
    try:
        return STRATEGIES[name](shapes=shapes, **options)
    except GuilomoError:
        raise
    except (TypeError, AttributeError, ValueError) as error:
        raise GuilomoError(
            f"strategy {name!r} cannot use its options {_shown(options)}: {error}. "
            f"Check their types; the options are {', '.join(sorted(accepted))}."
        ) from error


def _shown(options: Mapping[str, Any]) -> str:
    """The options a user can have written; not the routers and weights that come from the program."""
    plain = {key: value for key, value in options.items() if key != "weights" and not callable(value)}
    return ", ".join(f"{key}={reprlib.repr(value)}" for key, value in plain.items()) or "(none given)"
