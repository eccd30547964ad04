"""Rows of a run that start from a bank of ready-made adapters: which are chosen, what is attached, what is trained.

methods/NAME/selection.json   the choice, made once per method, before its first training
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from guilomo.adapters import Selection, adapters_in, mixture_of, read_adapter, select, xlora_of
from guilomo.adapters.fit import module_shapes
from guilomo.adapters.mixture import FOLLOW_FROM_ADAPTERS, import_plan
from guilomo.adapters.xlora import refuse_unloadable
from guilomo.allocation import Allocation
from guilomo.errors import GuilomoError
from guilomo.run.config import MethodConfig, RunConfig
from guilomo.run.files import write_json
from guilomo.run.ready_made import ReadyMade, folders_of, options_of, refuse_decided_keys
from guilomo.search.distributed import rank

if TYPE_CHECKING:
    from guilomo.run.pipeline import Run

METEORA = "meteora"
"""The router whose own loss reads the task of a row as the number of an adapter."""
XLORA = "xlora"
"""The one method of a bank that is PEFT's and no mixture of ours."""


class BankRow(BaseModel):
    """Options of a row that starts from adapters; see `select`, `mixture_of` and `xlora_of`."""

    model_config = ConfigDict(extra="forbid")

    bank: str | dict[str, str] = Field(description="Folder of adapter folders, or adapter folders by name.")
    by: Literal["all", "rocket", "accuracy", "perplexity", "manual", "random"] = Field(
        "all", description="How adapters are chosen; all: every one of the bank."
    )
    count: int = Field(4, ge=1, description="How many are chosen; not for all and manual.")
    names: list[str] | None = Field(None, description="Which, for manual.")
    k: int = Field(50, ge=1, description="Training rows that adapters are scored by.")
    pool: int = Field(8, ge=1, description="rocket: among how many of the best combinations are looked for.")
    seed: int = Field(0, description="Of these rows, or of the random choice.")
    train: Literal["router", "all"] = Field("router", description="What is trained: routers, or the adapters too.")
    saved_from: str | None = Field(None, description="Whose heads are taken over where they differ.")
    classifier: dict[str, Any] = Field(
        default_factory=dict, description="X-LoRA: layerwise, depth, size, dropout, temperature, top_k."
    )

    @model_validator(mode="after")
    def _consistent(self) -> BankRow:
        if (self.by == "manual") != (self.names is not None):
            raise ValueError(f"names = {self.names!r} contradicts by = {self.by!r}: give names with manual alone.")
        return self

    def adapters(self) -> dict[str, Path]:
        """The bank's adapter folders by name.

        Raises:
            GuilomoError: there are none.
        """
        return folders_of(self.bank, "options.bank", adapters_in)


def check_bank_row(method: MethodConfig, config: RunConfig) -> None:
    """Refuses options that the row cannot have, and banks that are not there.

    Raises:
        GuilomoError: see `options_of`; the bank has no adapters, or one that cannot become an expert.
    """
    row = options_of(method, BankRow)
    if method.strategy == XLORA and (row.train, row.saved_from, method.mixture) != ("router", None, {}):
        raise GuilomoError(
            f"Method {method.name!r} is PEFT's X-LoRA, of which the classifier alone is trained: leave out train, "
            "saved_from and the keys of mixture. options.classifier has what it can be told."
        )
    if method.strategy != XLORA and row.classifier:
        raise GuilomoError(
            f"Method {method.name!r} has options.classifier = {row.classifier!r}, but no classifier: that is X-LoRA's. "
            "Leave it out, or set mixture.router_options."
        )
    refuse_decided_keys(method, FOLLOW_FROM_ADAPTERS)
    for name, folder in row.adapters().items():
        adapter = read_adapter(folder, name)
        if method.strategy == XLORA:
            refuse_unloadable(adapter)
    known = list(row.adapters()) if row.by == "all" else row.names
    if method.strategy != XLORA and known is not None:
        _refuse_other_order(known, method, config)


def selection_file(config: RunConfig, method: MethodConfig) -> Path:
    """Where the choice of a row lies."""
    return config.folder / "methods" / method.name / "selection.json"


def selection_of(run: Run, method: MethodConfig) -> Selection:
    """The row's choice of adapters, from training rows only; made if it is not there yet.

    Raises:
        GuilomoError: see `select`; or the data have changed since it was made.
    """
    path = selection_file(run.config, method)
    if path.exists():
        found = Selection.load(path)
        run.refuse_other_data({"data_hash": found.data_hash}, path)
        return found
    row = options_of(method, BankRow)
    bank = row.adapters()
    names = list(bank) if row.by == "all" else row.names
    selection = select(
        run.fresh_model(run.config.seeds[0]),
        bank,
        run.task,
        row.k,
        by="manual" if row.by == "all" else row.by,
        count=row.count,
        names=names,
        pool=row.pool,
        seed=row.seed,
        batch_size=run.config.evaluation.batch_size,
        progress=lambda done, all_, name: run.progress(f"{method.name}: choice", done, all_, name),
    )
    if rank() == 0:
        write_json(path, selection.to_dict())
    return selection


def bank_plan(run: Run, method: MethodConfig) -> Allocation:
    """The plan of a mixture of the chosen adapters; of X-LoRA, that in which a token uses all of them.

    Raises:
        GuilomoError: see `selection_of`; or an adapter is not what it was when it was chosen.
    """
    chosen = _as_chosen(selection_of(run, method), method, run.config)
    adapters = [read_adapter(folder, name) for name, folder in chosen.items()]
    shapes = module_shapes(run.fresh_model(run.config.seeds[0]))
    top_k = len(adapters) if method.strategy == XLORA else run.config.mixture_of(method).top_k
    return import_plan(adapters, shapes, top_k)


def _as_chosen(selection: Selection, method: MethodConfig, config: RunConfig) -> dict[str, Path]:
    """The folders of the chosen adapters, which must be those that were chosen.

    By name: another machine may see the bank under another path than the one that chose.
    """
    remedy = f"delete {selection_file(config, method).parent} to choose and train again"
    return selection.in_bank(options_of(method, BankRow).adapters(), remedy)


def attach_bank(model: nn.Module, method: MethodConfig, config: RunConfig, task_type: str) -> PeftModel:
    """The model with the row's adapters, as `selection_of` has chosen them, ready to train.

    Raises:
        GuilomoError: an adapter is not what it was when it was chosen.
    """
    row = options_of(method, BankRow)
    adapters = _as_chosen(Selection.load(selection_file(config, method)), method, config)
    if method.strategy == XLORA:
        return xlora_of(model, adapters, **row.classifier)
    _refuse_other_order(list(adapters), method, config)
    mixture = config.mixture_of(method).peft_options()
    options = {name: value for name, value in mixture.items() if name not in FOLLOW_FROM_ADAPTERS}
    options |= {"train": row.train, "saved_from": row.saved_from, "task_type": task_type}
    return mixture_of(model, adapters, **options)


def _refuse_other_order(chosen: list[str], method: MethodConfig, config: RunConfig) -> None:
    """A router whose own loss says that expert e is that of task e needs the tasks in the order of the adapters."""
    mixture, parts = config.mixture_of(method), config.task.part_names
    if mixture.router != METEORA or not mixture.router_loss_coefficient or chosen[: len(parts)] == parts != []:
        return
    raise GuilomoError(
        f"Method {method.name!r} has router_loss_coefficient = {mixture.router_loss_coefficient:g}, which teaches its "
        f"router that the rows of part e belong to adapter e, but the parts are {', '.join(parts) or 'none'} and the "
        f"adapters {', '.join(chosen)}. Give task.parts the adapters' names in their order, or leave the coefficient "
        "out."
    )


ADAPTERS = ReadyMade(BankRow, check_bank_row, bank_plan, attach_bank)
