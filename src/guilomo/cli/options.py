"""Help for the keys of a recipe or comparison, from the same objects that validate it."""

from __future__ import annotations

import textwrap
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from guilomo.run import RunConfig


def describe_options(model: type[BaseModel] = RunConfig) -> str:
    """Every key of a recipe, or of another kind of file, with its default and what it trades off."""
    lines = ["keys of the file (in YAML, or with --set KEY=VALUE):"]
    for key, default, text in option_rows(model):
        lines.append(f"  {key}  [{default}]")
        lines += textwrap.wrap(text, width=92, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def option_rows(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """``(dotted key, default, description)`` of every field, depth first."""
    rows: list[tuple[str, str, str]] = []
    for name, info in model.model_fields.items():
        nested = _nested(info.annotation)
        if nested is not None:
            rows += option_rows(nested, f"{prefix}{name}.")
        else:
            rows.append((prefix + name, _default(info), info.description or ""))
    return rows


def _nested(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _default(info: Any) -> str:
    if info.default is not PydanticUndefined:
        return "unset" if info.default is None or info.default == "" else str(info.default)
    if info.default_factory is None:
        return "required"
    value = info.default_factory()
    items = [getattr(v, "name", v) for v in value] if isinstance(value, list) else value
    return ", ".join(map(str, items)) if get_args(info.annotation) and isinstance(items, list) else str(items)
