"""`guilomo bank`: what a folder of adapters holds, which of them suit a task, and a mixture of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.table import Table

from guilomo.adapters import Candidate, Selection, adapters_in, describe, select
from guilomo.cli.screen import console, print_table
from guilomo.errors import invalid, unknown
from guilomo.run import Run
from guilomo.run.bank import BankOptions, build_mixture
from guilomo.run.files import write_json

Prepared = Callable[[argparse.Namespace], AbstractContextManager[Run]]


def list_bank(arguments: argparse.Namespace) -> None:
    """`guilomo bank list`."""
    rows = [describe(folder, name) for name, folder in adapters_in(arguments.folder).items()]
    if arguments.json:
        console.print_json(json.dumps(rows))
        return
    table = _table("adapter", "kind", "modules", "ranks", "scales", "parameters", "base model")
    for row in rows:
        table.add_row(*_cells(row))
    print_table(table)
    for row in rows:
        if row["problem"]:
            console.print(f"{row['name']}: {row['problem']}", highlight=False, markup=False)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["name"]
    yield row["kind"] or "?"
    if row["problem"]:
        yield from ("–", "–", "–", "–")
    else:
        low, high = row["scales"]
        yield str(row["modules"])
        yield ", ".join(map(str, row["ranks"]))
        yield f"{low:.3g}" if low == high else f"{low:.3g} – {high:.3g}"
        yield f"{row['parameters']:,}"
    yield row["base"] or "–"


def select_from_bank(arguments: argparse.Namespace, prepared: Prepared) -> None:
    """`guilomo bank select`."""
    bank = adapters_in(arguments.bank)
    with prepared(arguments) as job:
        found = select(
            job.fresh_model(job.config.seeds[0]),
            bank,
            job.task,
            arguments.k,
            by=arguments.by,
            count=arguments.count,
            names=_names(arguments.names),
            pool=arguments.pool,
            seed=arguments.seed,
            batch_size=job.config.evaluation.batch_size,
            progress=lambda done, adapters, name: job.progress("score adapters", done, adapters, name),
        )
    if arguments.save:
        write_json(Path(arguments.save), found.to_dict())
    if arguments.json:
        console.print_json(json.dumps(found.to_dict()))
        return
    table = _table("adapter", "accuracy", "perplexity", "rank sum", "chosen")
    for candidate in found.candidates:
        table.add_row(*_scored(candidate, found.chosen))
    print_table(table)
    if found.examples:
        console.print(f"Scored on {len(found.examples)} training rows of {found.task}.", highlight=False, markup=False)
    console.print(f"chosen: {', '.join(found.chosen)}", highlight=False, markup=False)


def _scored(candidate: Candidate, chosen: list[str]) -> Iterator[str]:
    yield candidate.name
    yield "–" if candidate.accuracy is None else f"{candidate.accuracy:.4f}"
    yield "–" if candidate.perplexity is None else f"{candidate.perplexity:.4f}"
    yield "–" if candidate.rank_sum is None else str(candidate.rank_sum)
    yield str(1 + chosen.index(candidate.name)) if candidate.name in chosen else ""


def build_from_bank(arguments: argparse.Namespace, prepared: Prepared) -> None:
    """`guilomo bank build`."""
    selection = Selection.load(arguments.selection) if arguments.selection else None
    names = _names(arguments.names)
    if selection is not None:
        if names is not None:
            raise invalid("--names", arguments.names, "unset with --selection, which names the adapters")
        bank = adapters_in(arguments.bank) if arguments.bank else selection.folders
        adapters = selection.in_bank(bank, "choose again with guilomo bank select")
    elif arguments.bank:
        adapters = _named(adapters_in(arguments.bank), names)
    else:
        raise invalid("--bank", None, "a folder of adapters, where there is no --selection")
    options = BankOptions(arguments.top_k, arguments.router, arguments.train, arguments.saved_from, arguments.fit)
    with prepared(arguments) as job:
        report = build_mixture(job, adapters, options, Path(arguments.output), selection, arguments.resume)
    console.print(
        f"experts  {', '.join(report['adapters'])}\n"
        f"{report['parameters']:,} parameters, {report['trained_parameters']:,} of them trained\n"
        f"adapter  {arguments.output}",
        highlight=False,
        markup=False,
    )
    if not report["fit"] and report["trained_parameters"]:
        console.print("Its routers are new and choose at random: train them (--fit, or from Python).", highlight=False)


def _named(bank: dict[str, Path], names: list[str] | None) -> dict[str, Path]:
    for name in names or ():
        if name not in bank:
            raise unknown("--names", name, bank)
    return bank if names is None else {name: bank[name] for name in names}


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("adapter", "kind", "base model") else "right")
    return table
