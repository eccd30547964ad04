"""Tolerant access to compare.json: any part may be missing or null, and no caller has to ask twice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guilomo.errors import invalid
from guilomo.report.reading import Method, label_of, methods_of, part
from guilomo.report.units import Unit, lower_is_better, number, unit_of

Comparison = Mapping[str, Any]
SCHEMA = 1
#: The level of every test, where the file does not say.
ALPHA = 0.05


@dataclass(frozen=True)
class Task:
    """One task of the comparison.

    Attributes:
        name: its name, the key of every method's results.
        metric: what is compared on it.
        higher: whether a larger value is the better one.
        counted: whether it is part of the verdict.
        note: why it is not, or how far above chance it is.
        source: its entry in the file.
    """

    name: str
    metric: str
    higher: bool
    counted: bool
    note: str
    source: Mapping[str, Any]

    @property
    def unit(self) -> Unit:
        """How its metric is written."""
        return unit_of(self.metric)


@dataclass(frozen=True)
class Span:
    """A ratio with the interval over its repetitions, where there is one."""

    middle: float
    low: float | None
    high: float | None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval, if both ends are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Result:
    """One method on one task; what was not measured is None.

    Attributes:
        mean, low, high: the metric over seeds with its interval.
        rank: 1 for the best of the methods that are done on the task.
        rate: the learning rate it was trained at.
        parameters, active: trainable ones, and those that one token uses.
        step: step time as a multiple of the reference's.
        memory: peak memory as a multiple of the reference's.
        cells: the seeds; done, failed, missing: how many of them are.
    """

    mean: float | None
    low: float | None
    high: float | None
    rank: float | None
    rate: float | None
    parameters: float | None
    active: float | None
    step: Span | None
    memory: float | None
    cells: tuple[Mapping[str, Any], ...]
    done: int
    failed: int
    missing: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval, if both ends are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def check_comparison(compare: Comparison) -> None:
    """Refuses what is not the result of a comparison, and one whose layout this version does not know."""
    if not isinstance(compare, Mapping) or "schema" not in compare:
        found = sorted(compare) if isinstance(compare, Mapping) else type(compare).__name__
        raise invalid("compare", found, "a mapping with the key 'schema'", "Give the compare.json of guilomo compare.")
    if compare["schema"] != SCHEMA:
        remedy = "Use the guilomo version that wrote the file."
        raise invalid("compare.schema", compare["schema"], str(SCHEMA), remedy)


def tasks_of(compare: Comparison) -> list[Task]:
    """The tasks in the order of the file."""
    return [_task(entry) for entry in compare.get("tasks") or []]


def _task(entry: Mapping[str, Any]) -> Task:
    metric = str(entry.get("metric") or "")
    higher = entry.get("higher_is_better")
    return Task(
        name=str(entry.get("name") or "unnamed"),
        metric=metric,
        higher=not lower_is_better(metric) if higher is None else bool(higher),
        counted=entry.get("above_chance") is not False,
        note=str(entry.get("chance_note") or ""),
        source=entry,
    )


def ordered_methods(compare: Comparison) -> list[Method]:
    """The methods, lowest mean rank first, those without one last and in the order of the file."""

    def place(method: Method) -> tuple[bool, float]:
        rank = number(method.get("mean_rank"))
        return rank is None, rank or 0.0

    return sorted(methods_of(compare), key=place)


def reference_of(compare: Comparison) -> str:
    """The name of the method that all others are tested against."""
    return str(compare.get("reference") or "lora")


def reference_label(compare: Comparison) -> str:
    """What the page calls that method."""
    name = reference_of(compare)
    return next((label_of(method) for method in methods_of(compare) if method.get("name") == name), "LoRA")


def is_reference(compare: Comparison, method: Method) -> bool:
    """Whether the others are tested against this method."""
    return bool(method.get("name") == reference_of(compare))


def seeds_of(compare: Comparison) -> list[Any]:
    """The seeds that every method is trained with."""
    return list(compare.get("seeds") or [])


def alpha_of(compare: Comparison) -> float:
    """The level at which a difference counts as more than noise."""
    return number(part(compare, "friedman").get("alpha")) or ALPHA


def result_of(compare: Comparison, method: Method, task: Task) -> Result:
    """A method on a task; a seed that the file does not mention is missing."""
    entry = part(method, "tasks", task.name)
    cells = _cells(compare, entry)
    states = [cell.get("status") for cell in cells]
    return Result(
        **{key: number(entry.get(key)) for key in ("mean", "low", "high", "rank", "parameters")},
        active=number(entry.get("active_parameters")),
        rate=number(entry.get("learning_rate")),
        step=_span(part(entry, "step_time_ratio")),
        memory=number(entry.get("peak_bytes_ratio")),
        cells=cells,
        done=states.count("done"),
        failed=states.count("failed"),
        missing=len(states) - states.count("done") - states.count("failed"),
    )


def _cells(compare: Comparison, entry: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """One cell per seed, in the order of the seeds; further ones after them."""
    found = {cell.get("seed"): cell for cell in entry.get("cells") or []}
    seeds = dict.fromkeys([*seeds_of(compare), *found])
    return tuple(found.get(seed) or {"seed": seed, "status": "missing"} for seed in seeds)


def _span(entry: Mapping[str, Any]) -> Span | None:
    middle = number(entry.get("median"))
    return None if middle is None else Span(middle, number(entry.get("low")), number(entry.get("high")))
