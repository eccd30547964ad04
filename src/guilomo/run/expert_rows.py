"""Rows of a run that start from fully fine-tuned models: their experts are extracted once, and attached ever after.

methods/NAME/experts.safetensors   the extracted experts, made once per method, before its first training
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from guilomo.allocation import Allocation
from guilomo.run.config import MethodConfig, RunConfig
from guilomo.run.ready_made import ReadyMade, folders_of, options_of, refuse_decided_keys
from guilomo.sparse_moe import Extraction, extraction_of_models, models_in, ranks_by_name
from guilomo.sparse_moe.folders import check_folder, named_models
from guilomo.sparse_moe.models import FOLLOW_FROM_MODELS
from guilomo.tuner import plan_for_router

if TYPE_CHECKING:
    from guilomo.run.pipeline import Run


class ExpertRow(BaseModel):
    """Options of a row that starts from models; see `mixture_of_models`."""

    model_config = ConfigDict(extra="forbid")

    experts: str | dict[str, str] = Field(
        description="Folder of model folders, or model folders by name; trained from the run's model, feed-forwards "
        "alone."
    )
    ranks: Any = Field(
        description="Of the experts' changes: a number, or effective; for all, or one for each as a list or by name."
    )
    train: Literal["router", "all"] = Field(description="What is trained: routers, or the experts too.")

    def models(self) -> dict[str, Path]:
        """The model folders by name.

        Raises:
            GuilomoError: there are none.
        """
        return folders_of(self.experts, "options.experts", models_in)


def check_expert_row(method: MethodConfig, config: RunConfig) -> None:
    """Refuses options that the row cannot have, and models that are not there and whose experts are not yet extracted.

    Raises:
        GuilomoError: see `options_of` and `refuse_decided_keys`; no models or equal names, a folder without a model, or
            ranks that do not fit.
    """
    row = options_of(method, ExpertRow)
    refuse_decided_keys(method, FOLLOW_FROM_MODELS)
    if extraction_file(config, method).exists():
        return
    models = row.models()
    for name, folder in models.items():
        check_folder(folder, name)
    ranks_by_name(row.ranks, list(named_models(models)))


def extraction_file(config: RunConfig, method: MethodConfig) -> Path:
    """Where the extracted experts of a row lie."""
    return config.folder / "methods" / method.name / "experts.safetensors"


def expert_plan(run: Run, method: MethodConfig) -> Allocation:
    """The plan of a mixture of the row's experts, which are extracted if they are not there yet.

    Singular vectors have other last bits on another machine, so that every training starts from those of the file.
    """
    path = extraction_file(run.config, method)
    if not path.exists():
        row, mixture = options_of(method, ExpertRow), run.config.mixture_of(method)
        extraction_of_models(
            run.fresh_model(run.config.seeds[0]),
            row.models(),
            row.ranks,
            top_k=mixture.top_k,
            feed_forward_blocks=mixture.feed_forward_blocks,
            progress=lambda done, all_, name: run.progress(f"{method.name}: experts", done, all_, name),
        ).save(path)
    return plan_for_router(Extraction.load(path).plan, run.config.mixture_of(method).router)


def attach_experts(model: nn.Module, method: MethodConfig, config: RunConfig, task_type: str) -> PeftModel:
    """The model with the row's experts, as `expert_plan` has extracted them."""
    mixture = config.mixture_of(method).peft_options()
    options = {name: value for name, value in mixture.items() if name not in FOLLOW_FROM_MODELS}
    options |= {"train": options_of(method, ExpertRow).train, "task_type": task_type}
    return Extraction.load(extraction_file(config, method)).attach(model, **options)


MODELS = ReadyMade(ExpertRow, check_expert_row, expert_plan, attach_experts)
