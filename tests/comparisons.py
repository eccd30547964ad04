"""Tiny comparisons: two tasks on rows that name a colour, a few steps per training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from guilomo.compare import CompareConfig, Comparison
from tiny_runs import StopAfter, without_times

TIMED = {"step_time_ratio", "peak_bytes_ratio"}


class Finished(NamedTuple):
    """A comparison's content, its job, and what compare.json says."""

    content: dict[str, Any]
    job: Comparison
    results: dict[str, Any]


def comparison(model: Path, data: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """What a file would say; `changes` replace keys."""
    task = {"source": str(data), "file": "colours", "max_length": 64}
    content: dict[str, Any] = {
        "name": "tiny",
        "output": str(folder),
        "model": {"path": str(model), "device": "cpu"},
        "tasks": [{"name": "all", **task}, {"name": "few", **task, "test_size": 11, "train": {"max_steps": 4}}],
        "mixture": {"top_k": 2},
        "budget": {"experts": 4, "rank": 4},
        "search": {
            "max_experts": 5,
            "max_rank": 6,
            "steps": 4,
            "warmup_steps": 1,
            "batch_size": 8,
            "held_out_batch_size": 4,
        },
        "train": {"max_steps": 5, "batch_size": 8},
        "sweep": {"learning_rates": [1e-3, 1e-2]},
        "methods": ["guilomo", "lora", "uniform"],
        "seeds": [3, 1],
    }
    return {**content, **changes}


def job_of(content: dict[str, Any], stop: StopAfter | None = None) -> Comparison:
    config = CompareConfig.model_validate(content)
    if stop is None:
        return Comparison(config, "guilomo compare tiny.yaml")
    return Comparison(config, "guilomo compare tiny.yaml", stop.progress, stop.should_stop)


def finish(content: dict[str, Any], resume: bool = False, **options: Any) -> Finished:
    """Prepares and runs it to its end."""
    job = job_of(content)
    job.prepare(resume)
    return Finished(content, job, job.run(**options))


def numbers(results: dict[str, Any]) -> Any:
    """Results without what may differ between two equal comparisons: times, and ratios of times."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in TIMED}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(without_times(results))
