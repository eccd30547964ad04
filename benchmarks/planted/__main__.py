"""Runs the benchmark.

    python -m benchmarks.planted --output benchmarks/results/planted.json

All seeds are fixed and every cell runs on one thread, so that the same versions on the same machine give the same
numbers, whatever `--jobs` is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from benchmarks.planted.cell import cell_options, run_cell
from benchmarks.planted.record import Record, cells_in
from benchmarks.planted.summary import Cell
from benchmarks.planted.trial import SEARCHES
from benchmarks.planted.worlds import WORLDS
from guilomo.cli.progress import shown_progress
from guilomo.errors import GuilomoError

Task = tuple[str, int, tuple[str, ...]]
"""World, seed, searches."""
SLOW = ("guilomo", "soft", "authors_code")
DEFAULT_SEARCHES = {"residual-ranks": tuple(SEARCHES), "transformer-ranks": SLOW, "residual-experts": SLOW}
"""Where a search takes long, fewer comparisons."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cells that are missing and reports; 0 if all ran, 2 if something given cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    if options.resume and options.output is None:
        parser.error("--resume needs --output, the file to continue.")
    if options.seeds < 1 or options.jobs < 1:
        parser.error(f"--seeds = {options.seeds} and --jobs = {options.jobs} must be at least 1.")
    try:
        record = _run(options, shlex.join(["python", "-m", "benchmarks.planted", *given]))
    except GuilomoError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(record.to_dict()))
    else:
        _print_summary(record)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted", description=__doc__.partition("\n")[0])
    worlds = ", ".join(WORLDS)
    parser.add_argument("--world", nargs="+", choices=WORLDS, default=list(WORLDS), metavar="NAME", help=worlds)
    parser.add_argument(
        "--searches",
        nargs="+",
        choices=SEARCHES,
        metavar="NAME",
        help=f"{', '.join(SEARCHES)}; default: all in residual-ranks, {', '.join(SLOW)} elsewhere",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0..N-1 (default 5)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, one thread each (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress goes to stderr")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results here after every cell")
    parser.add_argument("--resume", action="store_true", help="keep FILE's cells of the same versions and options")
    return parser


def _run(options: argparse.Namespace, command: str) -> Record:
    searches = {world: tuple(options.searches or DEFAULT_SEARCHES[world]) for world in options.world}
    tasks = [(world, seed, searches[world]) for seed in range(options.seeds) for world in searches]
    record = Record(command, list(searches), list(range(options.seeds)))
    kept = {(cell["world"], cell["seed"]): cell for cell in (cells_in(options.output) if options.resume else [])}
    missing = []
    for world, seed, names in tasks:
        cell = kept.get((world, seed))
        if cell is not None and cell["options"] == cell_options(WORLDS[world](seed), seed, names):
            record.add(cell)
        else:
            missing.append((world, seed, names))
    with shown_progress(Console(stderr=True, soft_wrap=True), quiet=False) as progress:
        progress("cells", 0, len(missing), f"{len(record.cells)} kept")
        for done, cell in enumerate(_cells(missing, options.jobs), 1):
            record.add(cell)
            if options.output is not None:
                record.write(options.output)
            progress("cells", done, len(missing), _brief(cell))
    if options.output is not None:
        record.write(options.output)
    return record


def _cells(tasks: list[Task], jobs: int) -> Iterator[Cell]:
    """Finished cells, in any order."""
    if jobs == 1:
        yield from (run_cell(*task) for task in tasks)
        return
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        for future in as_completed([pool.submit(run_cell, *task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # a stopped run begins no further cell


def _brief(cell: Cell) -> str:
    found = (f"{name} {search['spearman'] or 0:.2f}" for name, search in cell["searches"].items())
    return f"{cell['world']}, seed {cell['seed']}: Spearman {', '.join(found)}; {cell['seconds']:.0f} s"


def _print_summary(record: Record) -> None:
    for name, world in record.to_dict()["summary"].items():
        print(f"{name}: mean Spearman over {len(world['seeds'])} seeds, test loss as a share of the planted effect")
        for label in world["test_loss"]:
            agreement = f"{world['spearman'][label]['value']:.2f}" if label in world["spearman"] else "-"
            print(f"  {label:13} {agreement:>6} {world['test_loss'][label]['value']:8.3f}")
        for goal, met in world["goals"].items():
            print(f"  {'met   ' if met else 'MISSED'} {goal}")


if __name__ == "__main__":
    sys.exit(main())
