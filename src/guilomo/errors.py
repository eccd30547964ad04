"""The errors users meet: each names the field, the value, what is allowed, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class GuilomoError(ValueError):
    """Something the user gave cannot be used; the message says what to change."""


def invalid(field: str, value: Any, allowed: str, remedy: str = "") -> GuilomoError:
    """Builds the error for one bad value, in the one form used everywhere.

    Args:
        field: the option, file or module at fault, as the user spells it.
        value: what was given.
        allowed: what would have been accepted.
        remedy: what to do next, if it does not follow from `allowed`.
    """
    message = f"{field} = {value!r} is not usable: expected {allowed}."
    return GuilomoError(f"{message} {remedy}".strip())


def unknown(field: str, value: str, choices: Iterable[str]) -> GuilomoError:
    """The error for a name that is not among `choices`; proposes the nearest one."""
    names = sorted(choices)
    near = get_close_matches(value, names, n=1, cutoff=0.5)
    remedy = f"Did you mean {near[0]!r}?" if near else ""
    return invalid(field, value, "one of " + ", ".join(names), remedy)
