"""`guilomo export`: finds the adapter, has it exported and measured, shows what is lost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from guilomo.cli.adapters import CONFIG, adapter_folder, load_adapter
from guilomo.cli.progress import shown_progress
from guilomo.cli.screen import console, print_table
from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.export import sentences
from guilomo.run import Run, RunConfig, load_recipe
from guilomo.run.export import ExportOptions, export_adapter
from guilomo.run.files import read_json
from guilomo.run.model import load_model
from guilomo.tasks import Task

ROWS = {
    "loss_routed": "loss of the mixture",
    "loss_export": "loss of the export",
    "loss_base": "loss of the base",
    "loss_added": "loss added by the export",
    "gain_kept": "share of the gain over the base that is kept",
    "agreement": "same prediction as the mixture",
    "divergence": "KL divergence from the mixture (nats)",
}


def export(arguments: argparse.Namespace) -> None:
    """The command."""
    adapter = adapter_folder(str(find_adapter(Path(arguments.folder), arguments.method, arguments.seed)))
    config = load_recipe(arguments.recipe) if arguments.recipe else _recipe_of(adapter)
    job = Run(config)
    options = ExportOptions(
        arguments.to,
        arguments.rank,
        arguments.uniform_rank,
        arguments.split,
        arguments.rows,
        config.evaluation.batch_size,
    )
    output = Path(arguments.output) if arguments.output else adapter.parent / options.label
    if arguments.recipe is None:
        _refuse_other_data(job.task, adapter)
    model = load_adapter(load_model(config.model, job.task, config.seeds[0]), adapter, "folder", job.task.parts)
    with shown_progress(console, arguments.quiet) as progress:
        report = export_adapter(model, job.task, options, output, progress)
    print_table(_table(report["measures"]))
    for sentence in sentences(report):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"export   {output}\nnumbers  {output / 'export.json'}", highlight=False, markup=False)


def find_adapter(folder: Path, method: str | None, seed: int | None) -> Path:
    """The adapter in an adapter folder, a seed folder of a run, or a run folder.

    Raises:
        GuilomoError: there is none, or the run has none of this method and seed.
    """
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    found = {p.parents[1]: p for p in sorted(folder.glob(f"methods/*/seed-*/adapter/{CONFIG}"))}
    if not found:
        allowed = "a run folder with a trained method, a method's seed folder in it, or an adapter folder"
        raise invalid("folder", str(folder), allowed, "guilomo train prints such a folder.")
    methods = sorted({place.parent.name for place in found})
    if method is None and len(methods) > 1:
        raise GuilomoError(f"{folder} has several methods. Say which with --method: {', '.join(methods)}.")
    chosen = method or methods[0]
    if chosen not in methods:
        raise unknown("--method", chosen, methods)
    seeds = sorted(int(place.name.removeprefix("seed-")) for place in found if place.parent.name == chosen)
    if seed is not None and seed not in seeds:
        raise unknown("--seed", str(seed), map(str, seeds))
    return folder / "methods" / chosen / f"seed-{seeds[0] if seed is None else seed}" / "adapter"


def _recipe_of(adapter: Path) -> RunConfig:
    """The resolved recipe of the run that an adapter belongs to."""
    above = adapter.resolve().parents
    path = above[3] / "config.json" if len(above) > 3 else adapter / "config.json"
    if not path.is_file():
        raise GuilomoError(f"{adapter} is not part of a run. Name a recipe with its model and data: --recipe FILE.")
    try:
        return load_recipe(path)
    except GuilomoError as error:
        raise GuilomoError(
            f"{error} If another version of guilomo made the run, name its recipe: --recipe FILE."
        ) from None


def _refuse_other_data(task: Task, adapter: Path) -> None:
    """The numbers are to be of the rows that the run had."""
    path = adapter.parent / "result.json"
    if path.exists() and read_json(path)["data_hash"] != task.data_hash:
        raise GuilomoError(
            f"The data of {task.name!r} have changed since {adapter.parent} was made. Restore them, or say with "
            "--recipe FILE on which data to measure."
        )


def _table(measures: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("measure", "value", "95 % interval", "rows"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, label in ROWS.items():
        if name in measures:
            score = measures[name]
            interval = "–" if score["low"] is None else f"{score['low']:.4f} – {score['high']:.4f}"
            value = "not finite" if score["value"] is None else f"{score['value']:.4f}"
            table.add_row(label, value, interval, str(score["n"]))
    return table
