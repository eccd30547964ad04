"""Reads recipes: YAML plus ``--set`` overrides to a `RunConfig`, with errors that name the key and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from guilomo.errors import GuilomoError
from guilomo.run.config import RunConfig


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes, with ``key.subkey=value`` overrides applied on top.

    Raises:
        GuilomoError: the file cannot be read, or a key or value is not usable; every problem is listed.
    """
    content = _read(path) if path is not None else {}
    for override in overrides:
        _apply(content, override)
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        problems = [_explain(problem) for problem in error.errors()]
        raise GuilomoError(where + "\n".join(problems)) from None


def _read(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        near = get_close_matches(file.name, [f.name for f in file.parent.glob("*.yaml")], n=1) if file.parent else []
        hint = f" Did you mean {file.parent / near[0]}?" if near else ""
        raise GuilomoError(f"There is no recipe at {file}.{hint}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise GuilomoError(f"{file} is not readable as YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise GuilomoError(f"{file} holds a {type(content).__name__}; a recipe is a mapping of keys to values.")
    return content


def _apply(content: dict[str, Any], override: str) -> None:
    """Sets one ``a.b.c=value``; the value is read as YAML, so that numbers, lists and null work."""
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise GuilomoError(f"--set {override!r} is not usable: expected key=value, such as search.steps=100.")
    target: Any = content
    *parents, last = key.strip().split(".")
    for parent in parents:
        target = target[int(parent)] if isinstance(target, list) else target.setdefault(parent, {})
        if not isinstance(target, (dict, list)):
            raise GuilomoError(f"--set {override!r} is not usable: {parent!r} holds a single value, not a group.")
    value = yaml.safe_load(text)
    if isinstance(target, list):
        target[int(last)] = value
    else:
        target[last] = value


def _explain(problem: Any) -> str:
    """One pydantic problem in our form."""
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path) or "recipe"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{name} is not a known key: expected one of {', '.join(sorted(known))}.{hint}"
    if problem["type"] == "value_error":
        return message if not path else f"{name}: {message}"
    return f"{name} = {problem['input']!r} is not usable: {message[0].lower() + message[1:]}."


def _keys_at(path: Sequence[str]) -> list[str]:
    """The keys that a recipe knows at a path."""
    model: type[BaseModel] = RunConfig
    for part in path:
        field = model.model_fields.get(part)
        if field is None:  # an index into a list of the model found before
            continue
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return list(model.model_fields)
