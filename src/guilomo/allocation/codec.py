"""Plans as dictionaries and JSON text; reading is strict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from guilomo.allocation.modules import ModulePlan, plan_module
from guilomo.errors import GuilomoError, invalid, unknown

if TYPE_CHECKING:
    from guilomo.allocation.plan import Allocation

VERSION = 1
HEADER = ("version", "strategy", "scaling", "alpha")
MODULE = ("in_features", "out_features", "ranks", "top_k")
STRUCTURE = ("shared_a", "sequential_rank", "role", "block")
"""Written only where they differ from the default, so that plain plans stay as they were."""


def allocation_to_dict(allocation: Allocation) -> dict[str, Any]:
    """The plan in plain lists, dicts and numbers."""
    return {
        "version": VERSION,
        "strategy": allocation.strategy,
        "scaling": allocation.scaling,
        "alpha": allocation.alpha,
        "modules": {name: _module_to_dict(plan) for name, plan in allocation.modules.items()},
    }


def allocation_to_json(allocation: Allocation) -> str:
    """The same as text with one line per module, so that a person can read it and a line diff means something."""
    data = allocation_to_dict(allocation)
    header = "".join(f"  {json.dumps(key)}: {json.dumps(data[key])},\n" for key in HEADER)
    modules = ",\n".join(f"    {json.dumps(name)}: {json.dumps(plan)}" for name, plan in data["modules"].items())
    return f'{{\n{header}  "modules": {{\n{modules}\n  }}\n}}\n'


def fields_from_dict(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Allocation.

    Raises:
        GuilomoError: an unknown key (the nearest one is proposed), no modules, another format version.
    """
    _check_keys("allocation key", data, (*HEADER, "modules"), required=("modules",))
    if data.get("version", VERSION) != VERSION:
        raise invalid("version", data["version"], str(VERSION), "Update guilomo to read this file.")
    if not isinstance(data["modules"], Mapping):
        raise invalid("modules", data["modules"], "an object of module names")
    modules = {name: _module_from_dict(name, plan) for name, plan in data["modules"].items()}
    return {"modules": modules, **{key: data[key] for key in HEADER[1:] if key in data}}


def parse_json(text: str) -> dict[str, Any]:
    """The JSON object in `text`; GuilomoError if there is none or a key (a module) appears twice."""
    try:
        return dict(json.loads(text, object_pairs_hook=_unique))
    except (json.JSONDecodeError, TypeError) as error:
        raise GuilomoError(f"allocation is not a JSON object ({error}).") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict from JSON pairs; json alone would silently keep only the last of two equal keys."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise invalid("key", key, "every key once", "Remove one of the two entries.")
        found[key] = value
    return found


def _module_to_dict(plan: ModulePlan) -> dict[str, Any]:
    fields = {key: getattr(plan, key) for key in MODULE}
    structure = {key: getattr(plan, key) for key in STRUCTURE if getattr(plan, key) != getattr(ModulePlan, key)}
    return {**fields, "ranks": list(plan.ranks), **structure}


def _module_from_dict(name: str, data: Any) -> ModulePlan:
    """A plan from its dict; missing ranks mean not adapted, as in ModulePlan."""
    _check_keys(f"key of module {name!r}", data, (*MODULE, *STRUCTURE), required=MODULE[:2])
    if not isinstance(data.get("ranks", ()), (list, tuple)):
        raise invalid(f"ranks of module {name!r}", data["ranks"], "a list with one rank per expert")
    shape = (data["in_features"], data["out_features"])
    structure = {key: data[key] for key in STRUCTURE if key in data}
    return plan_module(name, shape, tuple(data.get("ranks", ())), data.get("top_k", 2), **structure)


def _check_keys(field: str, data: Any, allowed: Iterable[str], required: Iterable[str]) -> None:
    if not isinstance(data, Mapping):
        raise invalid(field, data, "an object with keys " + ", ".join(allowed))
    for key in data:
        if key not in allowed:
            raise unknown(field, str(key), allowed)
    for key in required:
        if key not in data:
            raise invalid(field, sorted(map(str, data)), f"{key!r} among the keys", f"Add {key!r}.")
