"""What a run would do: plans, costs and estimates, without training anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guilomo.allocation import Allocation
from guilomo.run.methods import FROM_SEARCH
from guilomo.run.searches import search_seeds
from guilomo.search.data import rows_at, to_device
from guilomo.search.estimate import estimate
from guilomo.tasks import Task
from guilomo.training import TrainConfig

if TYPE_CHECKING:
    from guilomo.run.pipeline import Run


@dataclass(frozen=True)
class DryRun:
    """Plans of the methods that need no search, and a summary in words."""

    plans: dict[str, Allocation]
    summary: str


def dry_run(run: Run) -> DryRun:
    """Resolves every plan and times one step of the search-sized mixture on this machine."""
    facts, task, config = run.facts, run.task, run.config
    trained_rows = len(task.train) + (len(task.held_out) if config.train.use_held_out else 0)
    steps = config.train.max_steps or _steps(trained_rows, config.train)
    lines = [
        f"task      {task.name}: {len(task.train)} training, {len(task.held_out)} held-out, {len(task.test)} test rows"
        + (f"; {cut}" if (cut := cut_texts(task)) else ""),
        f"budget    {facts['budget']:,} trainable parameters ({facts['budget_source']}), "
        f"{100 * facts['budget'] / facts['parameters']:.2f} % of the model",
        f"methods   {_counted(len(config.methods), 'method')} × {_counted(len(config.seeds), 'seed')} "
        f"× {_counted(steps, 'step')}",
    ]
    if rates := config.sweep.learning_rates:
        lines.append(
            f"sweep     {_counted(len(config.methods), 'method')} × {_counted(len(rates), 'learning rate')} with seed "
            f"{config.seeds[0]}: {_counted(len(config.methods) * (len(rates) - 1), 'training')} more"
        )
    if any(m.strategy in FROM_SEARCH for m in config.methods):
        lines += _search_lines(run, steps)
    return DryRun(facts["plans"], "\n".join(lines))


def cut_texts(task: Task) -> str:
    """How many texts were cut, in words; empty if none was."""
    cut = sum(task.truncated.values())
    were = "was" if cut == 1 else "were"
    return f"{_counted(cut, 'text')} {were} cut at task.max_length = {task.config.max_length}" if cut else ""


def _steps(rows: int, config: TrainConfig) -> int:
    """Optimiser steps as Trainer counts them: the last batch of an epoch may be short."""
    per_epoch = math.ceil(math.ceil(rows / config.batch_size) / config.accumulation)
    return math.ceil(per_epoch * config.epochs)


def _counted(amount: int, word: str) -> str:
    return f"{amount:,} {word}" if amount == 1 else f"{amount:,} {word}s"


def _search_lines(run: Run, steps: int) -> list[str]:
    job = run.search_job()
    batch = to_device(run.task.collate(rows_at(run.task.train, job.train_order(0))), job.device)
    found = estimate(job.problem, batch, run.config.search)
    rates, searches = run.config.sweep.learning_rates, len(search_seeds(run.config))
    trainings = len(run.config.methods) * (len(run.config.seeds) + max(len(rates) - 1, 0))
    rows = run.config.train.batch_size * run.config.train.accumulation / run.config.search.batch_size
    training = found["seconds_per_step"] * rows * steps * trainings
    start = run.config.search
    return [
        f"search    {start.steps} steps from {start.max_experts} experts × rank {start.max_rank}: "
        f"about {searches * found['seconds']:.0f} s and {found['memory_gib']:.2f} GiB"
        + (f"; {searches} searches, one per seed" if run.config.search_per_seed else ""),
        f"training  about {training:.0f} s in all, by the same measured step",
    ]
