"""``guilomo compare``: arguments to a comparison, and its result to the terminal."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from guilomo.cli.progress import shown_progress, stop_on_signal
from guilomo.cli.screen import console, print_table
from guilomo.compare import CompareConfig, Comparison
from guilomo.errors import GuilomoError, invalid
from guilomo.report.family import write_comparison
from guilomo.report.units import DASH, title_of, unit_of
from guilomo.run import Run
from guilomo.run.dry import dry_run
from guilomo.run.methods import router_cost
from guilomo.run.recipe import load_config


def compare(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    config = load_config(CompareConfig, arguments.file, arguments.overrides, _given(arguments))
    quiet = arguments.quiet or arguments.json
    if config.reference_added and not quiet:
        console.print("Plain LoRA is added to the methods: every row is tested against it.", highlight=False)
    with stop_on_signal() as should_stop, shown_progress(console, quiet) as progress:
        job = Comparison(config, arguments.typed, progress, should_stop)
        if arguments.dry_run:
            _dry(job)
            return
        if arguments.join:
            job.join(arguments.workers, arguments.storage)
            return
        job.prepare(arguments.resume or arguments.retry_failed, arguments.retry_failed)
        results = job.run(arguments.workers, arguments.storage)
    page = write_comparison(results, config.folder)
    if arguments.json:
        print(json.dumps(results, ensure_ascii=False))
    else:
        _show(results, job.results_file, page)


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.join and not arguments.storage:
        raise GuilomoError("--join needs --storage: the address that the comparison was started with.")
    if arguments.join and (arguments.resume or arguments.retry_failed or arguments.json):
        raise GuilomoError(
            "--join only does cells: --resume, --retry-failed and --json are for the command that started the "
            "comparison. Leave them out."
        )


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of the file that have options of their own."""
    found: dict[str, Any] = {}
    if arguments.model is not None:
        found["model"] = {"path": arguments.model}
    if arguments.budget is not None:
        found["budget"] = {"parameters": arguments.budget}
    for name in ("tasks", "methods"):
        if (text := getattr(arguments, name)) is not None:
            found[name] = [part.strip() for part in text.split(",")]
    if arguments.seeds is not None:
        try:
            found["seeds"] = [int(part) for part in arguments.seeds.split(",")]
        except ValueError:
            raise invalid("--seeds", arguments.seeds, "whole numbers with commas between them, such as 0,1,2") from None
    return found


def _dry(job: Comparison) -> None:
    """What there is to do, and what every method would cost."""
    config = job.config
    for task in config.tasks:
        run = Run(config.run_config(task))
        found = dry_run(run)
        console.print(f"\n{task.name}", style="bold", highlight=False)
        console.print(found.summary, highlight=False, markup=False)
        for name, plan in found.plans.items():
            router = router_cost(run.config, next(m for m in run.config.methods if m.name == name))
            console.print(f"  {name}: {plan.parameters(router):,} parameters", highlight=False, markup=False)
    total, left = len(job.board.cells), len(job.board.open())
    console.print(f"\n{total} cells, {total - left} of them settled.", highlight=False)


def _show(results: dict[str, Any], path: Path, page: Path) -> None:
    print_table(table_of(results))
    for failure in results["failures"]:
        text = "{task}: {method} seed {seed} failed: {error}".format(**failure)
        console.print(text, highlight=False, markup=False)
    for sentence in results["verdict"]:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"\npage     {page}\nresults  {path}", highlight=False)


def table_of(results: dict[str, Any]) -> Table:
    """Methods by tasks: the mean over seeds with its interval; mean rank; cost beside plain LoRA."""
    table = Table(title=_plain(results["name"]), box=None, header_style="dim", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for task in results["tasks"]:
        table.add_column(_plain(f"{task['name']}\n{title_of(task['metric'])}"), justify="right", no_wrap=True)
    for name in ("mean rank", "step vs LoRA", "memory vs LoRA"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in results["methods"]:
        entries = [method["tasks"][task["name"]] for task in results["tasks"]]
        scores = [_score(entry, task["metric"]) for entry, task in zip(entries, results["tasks"], strict=True)]
        rank = DASH if method["mean_rank"] is None else f"{method['mean_rank']:.2f}"
        steps = [entry["step_time_ratio"] and entry["step_time_ratio"]["median"] for entry in entries]
        memory = [entry["peak_bytes_ratio"] for entry in entries]
        style = "bold" if method["name"] == results["reference"] else None
        table.add_row(_plain(method["label"]), *scores, rank, _ratio(steps), _ratio(memory), style=style)
    return table


def _score(entry: dict[str, Any], metric: str) -> str:
    unit = unit_of(metric)
    if entry["mean"] is None:
        return DASH
    if entry["low"] is None:
        return unit.show(entry["mean"])
    return _plain(f"{unit.show(entry['mean'])} [{unit.bare(entry['low'])}, {unit.bare(entry['high'])}]")


def _ratio(values: list[float | None]) -> str:
    """The range over tasks."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return DASH
    ends = dict.fromkeys(f"{value:.2f}" for value in (known[0], known[-1]))
    return DASH.join(ends) + " ×"


def _plain(text: str) -> str:
    """Square brackets are markup to rich."""
    return text.replace("[", r"\[")
