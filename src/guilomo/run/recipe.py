"""Reads YAML plus ``--set`` overrides into a validated object, with errors that name the key and the remedy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from guilomo.errors import GuilomoError
from guilomo.run.config import RunConfig

Config = TypeVar("Config", bound=BaseModel)


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes; see `load_config`."""
    return load_config(RunConfig, path, overrides)


def load_config(
    kind: type[Config],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> Config:
    """The object that a YAML file describes, with ``key.subkey=value`` overrides applied on top.

    Args:
        kind: the class whose fields are the file's keys.
        given: keys that replace those of the file, key by key in groups, before the overrides are applied.

    Raises:
        GuilomoError: the file cannot be read, or a key or value is not usable; every problem is listed.
    """
    content = _read(path) if path is not None else {}
    for key, value in (given or {}).items():
        group = content.get(key)
        content[key] = {**group, **value} if isinstance(group, dict) and isinstance(value, dict) else value
    for override in overrides:
        _apply(content, override)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise GuilomoError(where + "\n".join(problems(error, kind))) from None


def problems(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Every problem that pydantic found with an object of a class, in our form."""
    return list(dict.fromkeys(_explain(problem, kind) for problem in _merged(error.errors())))


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
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise GuilomoError(f"--set {override!r} is not usable: {text!r} is not a YAML value.") from None
    target: Any = content
    *parents, last = key.strip().split(".")
    for parent in parents:
        if isinstance(target, list):
            target = target[_index(parent, target, override)]
        else:
            # A group that the file names but leaves empty is null.
            target[parent] = {} if target.get(parent) is None else target[parent]
            target = target[parent]
        if not isinstance(target, (dict, list)):
            raise GuilomoError(f"--set {override!r} is not usable: {parent!r} holds a single value, not a group.")
    target[_index(last, target, override) if isinstance(target, list) else last] = value


def _index(text: str, items: list[Any], override: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise GuilomoError(
            f"--set {override!r} is not usable: {text!r} is not the place of an item; the list has {len(items)}, "
            "counted from 0."
        )
    return int(text)


def _merged(problems: Sequence[Any]) -> list[Any]:
    """One problem per place: a value that fits none of several types is reported by pydantic once per type."""
    merged: dict[tuple[Any, ...], Any] = {}
    for problem in problems:
        place = tuple(part for part in problem["loc"] if not _is_type_name(part))
        if place in merged and len(place) < len(problem["loc"]):
            message = f"{merged[place]['msg']}, or {problem['msg'][0].lower()}{problem['msg'][1:]}"
            merged[place] = {**merged[place], "msg": message}
        else:
            merged[place] = {**problem, "loc": place}
    return list(merged.values())


def _is_type_name(part: Any) -> bool:
    """Whether part of a place is how pydantic names a member of a union."""
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or "[" in part)


def _explain(problem: Any, kind: type[BaseModel]) -> str:
    """One pydantic problem in our form."""
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path) or "recipe"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _keys_at(kind, path[:-1])
        near = get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{name} is not a known key: expected one of {', '.join(sorted(known))}.{hint}"
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{name} = {problem['input']!r} is not usable: expected keys with values."
    if problem["type"] == "missing":
        return f"{name} is missing. Give it in the file, or with --set {name}=..."
    if problem["type"] == "value_error":
        return message if not path else f"{name}: {message}"
    return f"{name} = {problem['input']!r} is not usable: {message[0].lower() + message[1:]}.{_nearest(problem)}"


def _nearest(problem: Any) -> str:
    """The allowed word nearest to a misspelt one."""
    if problem["type"] != "literal_error" or not isinstance(problem["input"], str):
        return ""
    near = get_close_matches(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _keys_at(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys that are known at a path."""
    model = kind
    for part in path:
        field = model.model_fields.get(part)
        if field is None:  # an index into a list of the model found before
            continue
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return list(model.model_fields)
