"""Runs the benchmark.

    python -m benchmarks.speed --output benchmarks/results/speed/NAME.json

Everything is compared within one process, round by round; rounds in which other work ran are thrown away. Counted
figures (kernels, bytes, graphs) do not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.speed.cells import Cell, Result, Setting, cells_for, chosen
from benchmarks.speed.record import Record, kept_cells
from benchmarks.speed.report import printed
from guilomo.cli.progress import shown_progress
from guilomo.errors import GuilomoError, invalid

ROUNDS, QUICK_ROUNDS = 15, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cells that are missing and reports; 0 if all ran, 1 if one failed, 2 if an option cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    if options.resume and options.output is None:
        parser.error("--resume needs --output, the file to continue.")
    try:
        cells = chosen(cells_for(options.quick, options.device == "cuda"), options.only)
        if options.list:
            print("\n".join(cell.name for cell in cells))
            return 0
        record = _run(options, cells, _typed(given))
    except GuilomoError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(record.to_dict()) if options.json else printed(record.to_dict()))
    return 1 if any("error" in cell and "absent" not in cell for cell in record.cells) else 0


def _typed(given: Sequence[str]) -> str:
    """The command for the result file, in which paths of this machine are cut to the names of their files."""
    return shlex.join(
        ["python", "-m", "benchmarks.speed", *(Path(g).name if Path(g).is_absolute() else g for g in given)]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few small cells, 2 minutes at most on 2 free cores")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default cpu)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="kinds or names of cells, see --list")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"undisturbed rounds per timing (default {ROUNDS}; quick {QUICK_ROUNDS})",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: as torch chooses)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and inputs (default 0)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: time of the process, for --threads 1 on a busy machine (default wall; cuda uses events)",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress goes to stderr")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results here after every cell")
    parser.add_argument("--resume", action="store_true", help="keep FILE's cells of the same code, machine and options")
    return parser


def _setting(options: argparse.Namespace) -> Setting:
    rounds = options.rounds if options.rounds is not None else (QUICK_ROUNDS if options.quick else ROUNDS)
    if rounds < 1:
        raise invalid("--rounds", rounds, "at least 1")
    if options.threads is not None:
        if options.threads < 1:
            raise invalid("--threads", options.threads, "at least 1")
        torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise invalid("--device", "cuda", "a machine with a GPU that torch can use", "Use --device cpu.")
    if options.clock == "cpu" and (options.device == "cuda" or torch.get_num_threads() > 1):
        raise invalid("--clock", "cpu", "wall, unless one thread runs on the processor", "Add --threads 1.")
    clock = "events" if options.device == "cuda" else options.clock
    return Setting(torch.device(options.device), rounds, options.seed, clock)


def _run(options: argparse.Namespace, cells: Sequence[Cell], command: str) -> Record:
    setting = _setting(options)
    record = Record(command, [cell.name for cell in cells], setting)
    kept = {cell["name"]: cell for cell in (kept_cells(options.output, setting) if options.resume else [])}
    missing = [cell for cell in cells if cell.name not in kept]
    for cell in cells:
        if cell.name in kept:
            record.add(kept[cell.name])
    # PEFT reads an attribute that transformers has renamed.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    with shown_progress(Console(stderr=True, soft_wrap=True), quiet=False) as progress:
        progress("cells", 0, len(missing), f"{len(record.cells)} kept")
        for done, cell in enumerate(missing, 1):
            record.add(cell.run(setting))
            if options.output is not None:
                record.write(options.output)
            progress("cells", done, len(missing), _brief(record, cell.name))
    if options.output is not None:
        record.write(options.output)
    return record


def _brief(record: Record, name: str) -> str:
    result: Result = next(cell for cell in record.cells if cell["name"] == name)
    if "error" in result:
        return f"{name}: {result['error']}"
    noisy = any(timing["noisy"] for timing in result.get("times", {}).values())
    return f"{name}: {result['seconds']:.0f} s{', noisy' if noisy else ''}"


if __name__ == "__main__":
    sys.exit(main())
