"""May a folder that holds results be continued with these settings?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from guilomo.errors import GuilomoError

BY_NAME = ("methods", "tasks")
"""Lists of entries with names."""
GROWING = (*BY_NAME, "seeds", "learning rates")
"""What may be added to: an entry does not depend on the others."""
Settings = Mapping[str, Any]


def refuse_changes(what: str, folder: Path, saved: Settings, present: Settings, resume: bool) -> None:
    """Refuses a folder that was made with other settings, or that is not meant to be continued.

    Methods, tasks, seeds and the learning rates of a sweep may be added, since every training depends on its own alone.
    What was there must be there still and be as it was, and so must the first seed, which the rates are chosen with.

    Args:
        what: "run" or "comparison".
        folder: the output folder. saved, present: the resolved settings it was made with, and those of now.
        resume: whether to continue what is there.

    Raises:
        GuilomoError: names the keys that differ, or the option.
    """
    if found := differences(_by_name(saved), _without_additions(_by_name(saved), _by_name(present))):
        raise GuilomoError(
            f"{folder} holds a {what} with other settings ({found}). Give another output folder (--set output=...), or "
            "delete it."
        )
    if not resume:
        raise GuilomoError(
            f"{folder} already holds this {what}. Continue or show it with --resume, give another output folder (--set "
            "output=...), or delete it."
        )


def _by_name(settings: Settings) -> dict[str, Any]:
    """Settings in which the order of entries does not count, but for the first seed."""
    found = dict(settings)
    for key in BY_NAME:
        found[key] = {entry["name"]: entry for entry in settings.get(key, [])}
    first, *others = settings["seeds"]
    rates = settings["sweep"]["learning_rates"]
    # With no sweep, trainings were at another rate, and on the held-out rows too.
    found |= {"first seed": first, "swept": bool(rates), "sweep": dict(settings["sweep"], learning_rates=None)}
    return {**found, "seeds": _present(others), "learning rates": _present(rates)}


def _present(values: Iterable[float]) -> dict[str, str]:
    return {str(value): "present" for value in values}


def _without_additions(saved: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
    """The present settings without the entries that are new."""
    kept = {key: {name: value for name, value in present[key].items() if name in saved[key]} for key in GROWING}
    return {**present, **kept}


def differences(a: Any, b: Any, path: str = "") -> str:
    """The first few keys in which two resolved recipes differ; empty if there are none."""
    found: list[str] = []

    def walk(x: Any, y: Any, at: str) -> None:
        if isinstance(x, dict) and isinstance(y, dict):
            for key in sorted({*x, *y}):
                walk(x.get(key), y.get(key), f"{at}.{key}" if at else key)
        elif x != y:
            found.append(f"{at}: {x!r} there, {y!r} now")

    walk(a, b, path)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
