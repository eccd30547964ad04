"""Options of routers and of balance losses: names from signatures, values by small checks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from guilomo.errors import invalid, unknown


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a function and their defaults."""
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is inspect.Parameter.KEYWORD_ONLY}


def completed(field: str, owner: str, options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`options` with the defaults of those not given.

    Raises:
        GuilomoError: an option that `owner` does not have; proposes the nearest one.
    """
    for name in options:
        if name not in defaults:
            near = get_close_matches(str(name), list(defaults), n=1, cutoff=0.5)
            allowed = f"one of {', '.join(defaults)}, the options of {owner}" if defaults else f"none: {owner} has none"
            raise invalid(f"{field} name", name, allowed, f"Did you mean {near[0]!r}?" if near else "")
    return {**defaults, **options}


def expect_number(
    field: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    whole: bool = False,
) -> None:
    """GuilomoError unless `value` is a finite number in these bounds (an int, if `whole`)."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and math.isfinite(value) and at_least <= value <= at_most and value > above:
        return
    bounds = [f"at least {at_least}"] if at_least > -math.inf else []
    bounds += [f"above {above}"] if above > -math.inf else []
    bounds += [f"at most {at_most}"] if at_most < math.inf else []
    kind = "a whole number" if whole else "a finite number"
    raise invalid(field, value, " ".join([kind, " and ".join(bounds)]).strip())


def expect_choice(field: str, value: Any, choices: Iterable[Any]) -> None:
    """GuilomoError unless `value` is one of `choices`; proposes the nearest one."""
    choices = list(choices)
    if value not in choices:
        raise unknown(field, str(value), [str(choice) for choice in choices])


def option(name: str) -> str:
    """How errors call a router's option."""
    return f"router_options[{name!r}]"
