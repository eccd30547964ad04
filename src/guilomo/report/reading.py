"""Tolerant access to results.json: any part may be missing, and no caller has to ask twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from guilomo.allocation.plan import Allocation
from guilomo.errors import invalid
from guilomo.report.units import number

Results = Mapping[str, Any]
Method = Mapping[str, Any]
SCHEMA = 1


@dataclass(frozen=True)
class Estimate:
    """One metric of one method: the mean, its interval if there is one, and the value of each seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval, if both ends are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def check_schema(results: Results) -> None:
    """Refuses what is not the results of a run, and results of a version whose layout this one does not know."""
    if not isinstance(results, Mapping) or "schema" not in results:
        found = sorted(results) if isinstance(results, Mapping) else type(results).__name__
        remedy = "Give the results.json that guilomo run wrote, or run again with --resume to have it made again."
        raise invalid("results", found, "a mapping with the key 'schema'", remedy)
    schema = results["schema"]
    if schema != SCHEMA:
        raise invalid("results.schema", schema, str(SCHEMA), "Use the guilomo version that wrote the file.")


def part(source: Mapping[str, Any] | None, *keys: str) -> Mapping[str, Any]:
    """The nested mapping at `keys`; an empty one if any step is missing or null."""
    found: Any = source or {}
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def methods_of(results: Results) -> list[Method]:
    """The methods of a run, in the order they were written."""
    return list(results.get("methods") or [])


def runs_of(method: Method) -> list[Mapping[str, Any]]:
    """The seeds of a method that were trained."""
    return list(method.get("runs") or [])


def label_of(method: Method) -> str:
    """The name a reader knows the method by."""
    return str(method.get("label") or method.get("name") or "unnamed")


def lead_of(results: Results) -> Method | None:
    """The method the page is about: the searched one, or else the first with an allocation."""
    methods = methods_of(results)
    searched = [method for method in methods if method.get("kind") == "searched"]
    planned = [method for method in methods if method.get("allocation")]
    return next(iter([*searched, *planned]), None)


def allocation_of(method: Method | None) -> Allocation | None:
    """The allocation of a method, if it has one."""
    stored = (method or {}).get("allocation")
    return Allocation.from_dict(stored) if stored else None


def metrics_of(results: Results) -> list[str]:
    """Every metric that was measured, the primary one first."""
    found: dict[str, None] = {}
    primary = results.get("primary_metric")
    for method in methods_of(results):
        sources: Iterable[Mapping[str, Any]] = [part(method, "summary")]
        sources = [*sources, *(part(run, "metrics") for run in runs_of(method))]
        found |= dict.fromkeys(name for source in sources for name in source)
    return sorted(found, key=lambda name: name != primary)


def primary_of(results: Results) -> str | None:
    """The metric the comparison is about, if anything was measured."""
    return next(iter(metrics_of(results)), None)


def sizes_of(results: Results) -> list[float]:
    """The trainable parameters of every method that has any, smallest first."""
    sizes = [number(method.get("parameters")) for method in methods_of(results)]
    return sorted(size for size in sizes if size)


def same_size(results: Results) -> bool:
    """Whether all methods are within 5 % of each other in trainable parameters: only then it is equal."""
    sizes = sizes_of(results)
    return bool(sizes) and sizes[-1] <= 1.05 * sizes[0]


def estimate_of(method: Method, metric: str) -> Estimate | None:
    """The mean, interval and seeds of one metric; the mean over seeds where no summary was written."""
    summary = part(method, "summary", metric)
    values = [number(part(run, "metrics", metric).get("value")) for run in runs_of(method)]
    seeds = tuple(value for value in values if value is not None)
    mean = number(summary.get("mean"))
    if mean is None and seeds:
        mean = fmean(seeds)
    if mean is None:
        return None
    return Estimate(mean, number(summary.get("low")), number(summary.get("high")), seeds)


def part_names(results: Results) -> list[str]:
    """The parts of a mixed task that were scored, in their order; none of a single task."""
    return list(dict.fromkeys(name for method in methods_of(results) for name in part(method, "parts")))


def on_part(method: Method, name: str) -> Method:
    """The method with its scores on one part of a mixed task in place of those on the whole."""
    runs = [{"metrics": part(run, "parts", name)} for run in runs_of(method)]
    return {**method, "summary": part(method, "parts", name), "runs": runs}


def step_seconds(method: Method) -> float | None:
    """The mean time of one training step over the seeds."""
    times = [number(run.get("step_seconds")) for run in runs_of(method)]
    known = [time for time in times if time is not None]
    return fmean(known) if known else None


def router_of(method: Method) -> Mapping[str, Any]:
    """The router statistics of the first seed that has any; experts have no identity across seeds."""
    return next((run["router"] for run in runs_of(method) if run.get("router")), {})
