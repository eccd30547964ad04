"""The learning rate of each method, chosen on the held-out rows before a test row is looked at.

methods/NAME/sweep/lr-RATE/  allocation.json, adapter/ and held_out.json of one training with the first seed
methods/NAME/sweep.json      every rate with its held-out loss, and the chosen one
methods/NAME/seed-S/result.waiting.json   a result at the rate that was chosen before rates were added
"""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from guilomo.allocation import Allocation
from guilomo.errors import GuilomoError
from guilomo.evaluation.forward import evaluating, row_results
from guilomo.run.config import MethodConfig
from guilomo.run.files import read_json, write_json
from guilomo.run.methods import attach
from guilomo.run.trained import load_trained
from guilomo.training import DivergedError

if TYPE_CHECKING:
    from guilomo.run.pipeline import Run

WAITING = "result.waiting.json"


def learning_rate(run: Run, method: MethodConfig) -> float:
    """The rate a method is trained at: that of the recipe, or the sweep's choice, for which this runs the sweep.

    Raises:
        GuilomoError: the task has no held-out rows, or the training diverged at every rate.
        Interrupted: the run was asked to stop; finished rates are kept.
    """
    if not _rates(run):
        return run.config.train.learning_rate
    path = sweep_file(run, method)
    if path.exists():
        found = read_json(path)
        run.refuse_other_data(found, path)
    elif not run.task.held_out:
        raise GuilomoError(
            "sweep.learning_rates chooses by the held-out loss, but the task has no held-out rows. Raise "
            "task.held_out_fraction, or leave sweep.learning_rates empty."
        )
    else:
        found = _choice(run, method, [_cell(run, method, rate) for rate in _rates(run)])
        write_json(path, found)
    return float(found["chosen"])


def sweep_file(run: Run, method: MethodConfig) -> Path:
    return run.config.folder / "methods" / method.name / "sweep.json"


def reopen(run: Run, method: MethodConfig) -> None:
    """Opens a finished choice again where rates were added to the recipe; the results at the old one wait for it."""
    path = sweep_file(run, method)
    if not path.exists() or {r["learning_rate"] for r in read_json(path)["rates"]} == set(_rates(run)):
        return
    for result in path.parent.glob("seed-*/result.json"):
        os.replace(result, result.with_name(WAITING))
    path.unlink()


def waiting_result(folder: Path, rate: float) -> dict[str, Any] | None:
    """The result that waits in a folder, if it is at the chosen rate, put back; one at another rate is deleted."""
    waiting = folder / WAITING
    if not waiting.exists():
        return None
    found: dict[str, Any] = read_json(waiting)
    if found["learning_rate"] == rate:
        os.replace(waiting, folder / "result.json")
        return found
    waiting.unlink()
    return None


def _rates(run: Run) -> list[float]:
    return run.config.sweep.learning_rates


def take_over(run: Run, method: MethodConfig, rate: float, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Copies the training at the chosen rate to the folder of its seed; returns the trained model and its record."""
    cell = _cell_folder(run, method, rate)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy2(cell / "allocation.json", folder / "allocation.json")
    shutil.copytree(cell / "adapter", folder / "adapter", dirs_exist_ok=True)
    plan = Allocation.load(folder / "allocation.json")
    model = attach(run.fresh_model(run.config.seeds[0]), plan, method, run.config, run.task)
    load_trained(model, folder / "adapter")
    return model, read_json(cell / "held_out.json")["training"]


def _cell_folder(run: Run, method: MethodConfig, rate: float) -> Path:
    return run.config.folder / "methods" / method.name / "sweep" / f"lr-{rate}"


def _cell(run: Run, method: MethodConfig, rate: float) -> dict[str, Any]:
    """Trains at one rate and scores the held-out rows; returns the content of its held_out.json."""
    folder = _cell_folder(run, method, rate)
    path, stage, seed = folder / "held_out.json", f"{method.name} lr {rate}", run.config.seeds[0]
    if path.exists():
        found: dict[str, Any] = read_json(path)
        run.refuse_other_data(found, folder)
        return found
    run.claim_for_data(folder)
    loss = training = diverged = None
    started = time.perf_counter()
    try:
        model, training = run.fit(method, seed, rate, folder, stage)
        loss = _held_out_loss(run, model, stage)
    except DivergedError as error:
        diverged = str(error)
    seconds = training["train_seconds"] if training else round(time.perf_counter() - started, 2)
    found = {"data_hash": run.task.data_hash, "seed": seed, "learning_rate": rate, "loss": loss}
    found |= {"diverged": diverged, "seconds": seconds, "training": training}
    write_json(path, found)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def _held_out_loss(run: Run, model: nn.Module, stage: str) -> float:
    """Mean loss per prediction of the held-out rows, in nats."""

    def report(done: int, rows: int) -> None:
        run.progress(f"{stage}: held-out", done, rows, "")

    with evaluating(model):
        losses, counts, _ = row_results(model, run.task, run.task.held_out, run.config.evaluation.batch_size, report)
    loss = sum(losses) / sum(counts)
    if not math.isfinite(loss):
        raise DivergedError(f"The held-out loss was {loss} after the training.")
    return loss


def _choice(run: Run, method: MethodConfig, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The rate of the lowest held-out loss, and whether a better one may lie beyond the grid."""
    losses: dict[float, float] = {c["learning_rate"]: c["loss"] for c in cells if c["loss"] is not None}
    rates = _rates(run)
    if not losses:
        reasons = " ".join(f"{c['learning_rate']}: {c['diverged']}" for c in cells)
        raise GuilomoError(
            f"sweep.learning_rates = {rates} is not usable: the training of {method.name!r} diverged at every one "
            f"({reasons}). Give lower ones, in another output folder (--set output=...)."
        )
    chosen = min(losses, key=losses.__getitem__)
    shown = ("learning_rate", "loss", "diverged", "seconds")
    return {
        "data_hash": run.task.data_hash,
        "seed": run.config.seeds[0],
        "rates": [{key: cell[key] for key in shown} for cell in cells],
        "chosen": chosen,
        "edge": chosen in (min(rates), max(rates)),
    }
