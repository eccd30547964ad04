"""What the page says in words: the line under the title, how to read the metric, how the run was made."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from guilomo.report.reading import (
    Results,
    estimate_of,
    lead_of,
    methods_of,
    part,
    primary_of,
    runs_of,
    same_size,
    sizes_of,
)
from guilomo.report.units import DASH, count, duration, lower_is_better, number, plain, share, title_of, unit_of


def facts_of(results: Results) -> list[str]:
    """The line under the title: model, data, budget, effort."""
    model, data = part(results, "model"), part(results, "data")
    budget = part(results, "budget")
    facts = [str(model["name"])] if model.get("name") else []
    facts += [str(data["name"])] if data.get("name") else []
    if number(budget.get("parameters")) is not None:
        source = f" ({budget['source']})" if budget.get("source") else ""
        facts.append(f"budget {count(budget['parameters'])} trainable parameters{source}")
    methods = methods_of(results)
    if methods:
        facts.append(plural(len(methods), "method") + f" × {plural(len(_seeds(results)), 'seed')}")
    return facts


def plural(amount: int, word: str) -> str:
    """A number and its word: `1 seed`, `3 seeds`."""
    return f"{amount} {word}" if amount == 1 else f"{amount} {word}s"


def _seeds(results: Results) -> list[Any]:
    """Every seed that was run, in order of appearance."""
    return list(dict.fromkeys(run.get("seed") for method in methods_of(results) for run in runs_of(method)))


def metric_facts(results: Results) -> dict[str, Any] | None:
    """The primary metric and how to read it."""
    name = primary_of(results)
    if name is None:
        return None
    lead = lead_of(results)
    found = estimate_of(lead, name) if lead else None
    chance = number(part(results, "data").get("chance"))
    return {
        "title": title_of(name),
        "lower": lower_is_better(name),
        "chance": unit_of(name).show(chance) if chance is not None and unit_of(name).suffix else "",
        "band": found is not None and found.bounds is not None,
    }


def size_facts(results: Results) -> str:
    """Whether the methods are equal in size, which every comparison of quality rests on."""
    sizes = sizes_of(results)
    if len(sizes) < 2:
        return ""
    span = f"{count(sizes[0])} to {count(sizes[-1])} trainable parameters"
    return (
        f"All methods have nearly the same size, {span}."
        if same_size(results)
        else (f"The methods differ in size, from {span}: part of any difference may be due to that.")
    )


def search_facts(results: Results) -> dict[str, Any] | None:
    """What to say about the search in words."""
    search = part(results, "search")
    if not search:
        return None
    moved = part(search, "moved")
    searches = search.get("searches") or []
    return {
        "relaxation": search.get("relaxation") or DASH,
        "hypergradient": search.get("hypergradient") or DASH,
        "steps": count(search.get("steps")),
        "outer": count(search.get("outer_steps")),
        "time": duration(search.get("seconds")),
        "early": bool(search.get("stopped_early")),
        "experts": plain(part(moved, "experts").get("mean")),
        "experts_most": plain(part(moved, "experts").get("max")),
        "ranks": plain(part(moved, "ranks").get("mean")),
        "ranks_most": plain(part(moved, "ranks").get("max")),
        "modules": share(moved.get("modules")),
        "warnings": [part(one, "moved").get("warning") for one in searches or [search]],
        "searches": len(searches),
        "agreement": plain(search.get("agreement")),
    }


def made_of(results: Results) -> list[tuple[str, str]]:
    """How the run was made: what is needed to repeat it."""
    data, hardware = part(results, "data"), part(results, "hardware")
    sizes = ", ".join(f"{count(size)} {name.replace('_', '-')}" for name, size in part(data, "sizes").items())
    truncated = number(data.get("truncated"))
    labels = ", ".join(map(str, data.get("labels") or []))
    pairs = {
        "Made": moment(results.get("created")),
        "guilomo": results.get("guilomo"),
        "Versions": ", ".join(f"{name} {version}" for name, version in part(results, "versions").items()),
        "Hardware": hardware_text(hardware),
        "Seeds": ", ".join(map(str, _seeds(results))),
        "Model": model_text(part(results, "model")),
        "Data": ", ".join(filter(None, [str(data.get("name") or ""), str(data.get("kind") or ""), sizes])),
        "Labels": labels,
        "Truncated": f"{count(truncated)} examples were cut to the length limit" if truncated else "",
        "Data hash": data.get("hash"),
    }
    return [(name, str(value) if value else "not recorded") for name, value in pairs.items() if _kept(name, value)]


def moment(text: Any) -> str:
    """An ISO time to the minute; whatever else was written stays as it is."""
    try:
        return f"{datetime.fromisoformat(str(text)):%Y-%m-%d %H:%M %Z}".strip()
    except ValueError:
        return str(text or "")


def _kept(name: str, value: Any) -> bool:
    """Labels and truncation do not apply to every kind of data; everything else is said to be missing."""
    return bool(value) or name not in ("Labels", "Truncated")


def hardware_text(hardware: Mapping[str, Any]) -> str:
    """The machine in one line; empty if it was not recorded."""
    if not hardware:
        return ""
    memory = number(hardware.get("memory_gib"))
    found = [
        str(hardware.get("cpu") or "unknown CPU"),
        plural(int(hardware["cores"]), "core") if hardware.get("cores") else "",
        f"{memory:g} GiB memory" if memory is not None else "",
        str(hardware.get("gpu") or "no GPU"),
    ]
    return ", ".join(filter(None, found))


def model_text(model: Mapping[str, Any]) -> str:
    """The model and its size; empty if it was not recorded."""
    size = f", {count(model['parameters'])} parameters" if model.get("parameters") else ""
    return f"{model['name']}{size}" if model.get("name") else ""
