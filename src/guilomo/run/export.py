"""Exports a trained mixture and measures what that loses: folder in, served folder and export.json out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

import guilomo
from guilomo.errors import invalid, unknown
from guilomo.evaluation.forward import batches_by_length, device_of
from guilomo.export import (
    card,
    compare,
    mean_gates,
    merged_copy,
    mixture_config,
    plain_lora,
    refuse_routed,
    routed_layers,
    unadapted_copy,
)
from guilomo.export.words import FORMS
from guilomo.run.files import write_json, write_text
from guilomo.run.pipeline import StageProgress
from guilomo.tasks import Task
from guilomo.tasks.tokenize import TokenRow


@dataclass(frozen=True)
class ExportOptions:
    """What to export to, and on how much data to measure it.

    Attributes:
        to: "stacked", "svd" or "merged". rank: of "svd". uniform_rank: one rank for all modules.
        split: on whose rows the loss is measured. rows: at most so many of them, and of the training rows for the
            gates. batch_size: rows per batch.

    Raises:
        GuilomoError: a value cannot be used, or two contradict each other.
    """

    to: str = "stacked"
    rank: int | None = None
    uniform_rank: bool = False
    split: str = "test"
    rows: int = 1000
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.to not in FORMS:
            raise unknown("to", self.to, FORMS)
        if self.split not in ("test", "held_out"):
            raise unknown("split", self.split, ("test", "held_out"))
        if self.rows < 1:
            raise invalid("rows", self.rows, "a number of at least 1")
        if (self.to == "svd") != (self.rank is not None):
            raise invalid("rank", self.rank, "a rank with 'svd', and none otherwise", "Use to='svd' with a rank.")
        if self.uniform_rank and self.to == "merged":
            raise invalid("uniform_rank", True, "unset with 'merged'", "Merged weights have no rank; leave it out.")

    @property
    def label(self) -> str:
        """A short name for a folder."""
        parts = [self.to, *([str(self.rank)] if self.rank else []), *(["uniform"] if self.uniform_rank else [])]
        return "export-" + "-".join(parts)


def export_adapter(
    model: PeftModel, task: Task, options: ExportOptions, output: Path, progress: StageProgress
) -> dict[str, Any]:
    """Writes the export of the model's mixture into `output`, measures it as read back from there, and reports.

    Returns:
        The content of export.json, which is written last, beside a model card.

    Raises:
        GuilomoError: `output` holds files; the adapter is no mixture; a routed one is to be merged; the rank is too
            high; a split has no rows.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise invalid("output", str(output), "a folder that is empty or not there", "Delete it or give another.")
    if options.to == "merged":
        refuse_routed(model)
    rows = {split: _some_rows(task, split, options.rows) for split in ("train", options.split)}
    gates = mean_gates(model, _batches(task, rows["train"], options.batch_size, progress))
    exported, modules = _written(model, task, gates, options, output)
    stage = f"loss on {options.split} rows"
    measured = compare(
        model, exported, task, rows[options.split], options.batch_size, lambda done, n: progress(stage, done, n, "")
    )
    report = {
        **_settings(model, task, options, {split: len(chosen) for split, chosen in rows.items()}),
        "measures": {name: score.to_dict() for name, score in measured.scores().items()},
        "modules": modules,
    }
    write_text(output / "README.md", card(report, mixture_config(model).base_model_name_or_path))
    write_json(output / "export.json", report)
    return report


def _some_rows(task: Task, split: str, count: int) -> list[TokenRow]:
    """At most `count` rows of a split, drawn with a fixed seed, in their order."""
    rows = task.rows(split)
    if not rows:
        raise invalid("split", split, "a split with rows", "Set held_out_fraction or the sources so that it has some.")
    chosen = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return [rows[index] for index in sorted(chosen)]


def _batches(task: Task, rows: list[TokenRow], size: int, progress: StageProgress) -> Iterator[dict[str, Tensor]]:
    done = 0
    for batch in batches_by_length([len(row["input_ids"]) for row in rows], size):
        yield task.collate([rows[index] for index in batch])
        done += len(batch)
        progress("gates on train rows", done, len(rows), "")


def _written(
    model: PeftModel, task: Task, gates: dict[str, Tensor], options: ExportOptions, output: Path
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The export as read back from `output`, and what became of each module."""
    modules: dict[str, dict[str, Any]] = {name: {"gates": gate.tolist()} for name, gate in gates.items()}
    if options.to == "merged":
        merged: Any = merged_copy(model)
        merged.save_pretrained(str(output))
        task.tokenizer.save_pretrained(str(output))
        return type(merged).from_pretrained(str(output)).to(device_of(model)), modules
    lora = plain_lora(model, gates, options.rank, options.uniform_rank)
    lora.save(output)
    for name, pair in lora.factors.items():
        modules[name] |= {"rank": pair.rank, "energy": lora.energy[name]}
    return PeftModel.from_pretrained(unadapted_copy(model), str(output)), modules


def _settings(model: PeftModel, task: Task, options: ExportOptions, rows: dict[str, int]) -> dict[str, Any]:
    """What was exported, and from which rows the numbers come."""
    return {
        "schema": 1,
        "guilomo": guilomo.__version__,
        "to": options.to,
        "rank": options.rank,
        "uniform_rank": options.uniform_rank,
        "head_saved": task.kind == "classification",
        "gates_from": {"split": "train", "rows": rows["train"]} if routed_layers(model) else None,
        "measured_on": {
            "task": task.name,
            "split": options.split,
            "rows": rows[options.split],
            "data_hash": task.data_hash,
        },
    }
