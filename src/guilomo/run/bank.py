"""A mixture of a bank's adapters, trained if asked for, and written: bank in, adapter folder and bank.json out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

import guilomo
from guilomo.adapters import Selection, mixture_of
from guilomo.errors import invalid
from guilomo.files import refuse_other, save_adapter
from guilomo.run.files import read_json, write_json
from guilomo.run.pipeline import Run
from guilomo.training import TrainResult, fine_tune


@dataclass(frozen=True)
class BankOptions:
    """How the adapters become a mixture, see `mixture_of`; and whether it is trained on the recipe's task."""

    top_k: int = 2
    router: str = "topk"
    train: str = "router"
    saved_from: str | None = None
    fit: bool = False


def build_mixture(
    job: Run,
    adapters: Mapping[str, Path],
    options: BankOptions,
    output: Path,
    selection: Selection | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Writes the mixture of `adapters` into `output`, trained as the recipe's `train` says where `fit` is asked for.

    A fit that was stopped continues from its checkpoint, in the folder ``OUTPUT.training``, if `resume` is set.

    Returns:
        The content of bank.json, which is written last: adapters, options, selection, and what training did.

    Raises:
        GuilomoError: `output` holds files; a stopped fit is there and `resume` is false, or is of another mixture; or
            as `mixture_of` and `fine_tune`.
        Interrupted: the training was asked to stop.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise invalid("output", str(output), "a folder that is empty or not there", "Delete it or give another.")
    mixture = {"adapters": {name: str(folder) for name, folder in adapters.items()}, **asdict(options)}
    checkpoint = output.with_name(output.name + ".training")
    if options.fit:
        _claim(checkpoint, mixture, resume)
    seed = job.config.seeds[0]
    model = mixture_of(
        job.fresh_model(seed),
        adapters,
        top_k=options.top_k,
        router=options.router,
        train=options.train,
        saved_from=options.saved_from,
    )
    fitted = _fit(job, model, checkpoint, seed) if options.fit else None
    save_adapter(model, output)
    report = {
        "schema": 1,
        "guilomo": guilomo.__version__,
        **mixture,
        "parameters": sum(p.numel() for n, p in model.named_parameters() if ".molora_" in n),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "fitted": fitted,
        "selection": None if selection is None else selection.to_dict(),
    }
    write_json(output / "bank.json", report)
    return report


def _claim(checkpoint: Path, mixture: dict[str, Any], resume: bool) -> None:
    """Notes which mixture a fit is of, or checks that it is the one being continued."""
    path = checkpoint / "bank.json"
    if not path.exists():
        write_json(path, mixture)
    elif not resume:
        remedy = f"Continue it with --resume, or delete {checkpoint}."
        raise invalid("output", str(checkpoint), "no fit that was stopped before", remedy)
    else:
        refuse_other(path, read_json(path), mixture)


def _fit(job: Run, model: PeftModel, checkpoint: Path, seed: int) -> dict[str, Any]:
    def progress(step: int, steps: int, text: str) -> None:
        job.progress("fit", step, steps, text)

    config = job.config.train
    done = fine_tune(model, job.task, config, checkpoint, seed=seed, progress=progress, should_stop=job.should_stop)
    shutil.rmtree(checkpoint)
    return _fit_record(job, done, seed)


def _fit_record(job: Run, done: TrainResult, seed: int) -> dict[str, Any]:
    return {
        "task": job.task.name,
        "data_hash": job.task.data_hash,
        "seed": seed,
        "steps": done.steps,
        "loss_curve": done.loss_curve,
        "train": job.config.train.model_dump(mode="json"),
    }
