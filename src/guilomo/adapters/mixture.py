"""Ready-made LoRA adapters as the experts of one mixture."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from guilomo.adapters.fit import module_shapes, refuse_other_base
from guilomo.adapters.lora import LoraAdapter, LoraPair, read_adapter
from guilomo.adapters.saved import saved_modules, write_saved
from guilomo.adapters.training import nothing_to_train
from guilomo.allocation import Allocation, ModulePlan
from guilomo.errors import invalid
from guilomo.tuner import LoraMoeConfig, LoraMoeLayer
from guilomo.tuner.decided import DECIDED_BY_EXPERTS, refuse_decided

Adapters = Mapping[str, str | Path] | Sequence[str | Path]
"""Folders by the name that each adapter is to have, or folders that are called as they are called."""

FOLLOW_FROM_ADAPTERS = DECIDED_BY_EXPERTS | {"modules_to_save"}
"""Fields of `LoraMoeConfig` that follow from the adapters."""


def mixture_of(
    model: nn.Module,
    adapters: Adapters,
    *,
    names: Sequence[str] | None = None,
    top_k: int = 2,
    router: str = "topk",
    train: str = "router",
    saved_from: str | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """One mixture whose experts are ready-made LoRA adapters, each with the effect that it has alone.

    Expert e of every module is adapter e: with all weight on it, the model computes what PEFT computes with that
    adapter alone. Packing ready-made adapters so is MeteoRA's (arXiv 2405.13053); other scales, ranks and modules for
    each adapter are ours.

    The plan's scale is exactly 1 (`scaling='constant'`, `alpha=1`). An adapter's scale ``alpha / r`` is multiplied into
    its B in float64 and rounded to the dtype of the mixture: nothing is lost where the scale is a power of 2, and
    otherwise half a unit in the last place of every element of B. A is copied bit for bit, and so is B where the scale
    is 1, as long as the mixture's dtype holds the adapter's.

    A module that only some adapters change gets, for each of the others, an expert of rank 1 that is zero. Its output
    is 0 and so are its gradients, so it stays zero in training. It costs ``I + O`` stored numbers and, as every expert,
    a row of the router. What a token gives to it of its weight, the other experts do not get: that is what choosing an
    adapter means which does not change this module.

    The routers are new and have to be trained; until then they choose at random.

    Args:
        model: the base model of all adapters.
        adapters: folders of PEFT, by name or in a sequence.
        names: with a sequence: what the adapters are called; unset: the names of their folders.
        top_k: adapters that a token uses; at most their number is used.
        router: as in `LoraMoeConfig`.
        train: "router", as MeteoRA's paper says (its script trains the experts too), or "all", as Rocket does (arXiv
            2408.15915).
        saved_from: the adapter whose `modules_to_save` the mixture takes, where those of the adapters differ.
        adapter_name: PEFT's name of the mixture.
        **options: other fields of `LoraMoeConfig`. There is no balance loss unless one is asked for, as neither paper
            has one.

    Raises:
        GuilomoError: no adapters, names that are equal, an adapter that is not plain LoRA (`read_adapter`) or is of
            another base model, or modules trained whole that differ; options that the import decides.
    """
    if isinstance(model, PeftModel):
        raise invalid("model", type(model).__name__, "the base model", "Pass model.unload(), or load the base anew.")
    refuse_decided(options, FOLLOW_FROM_ADAPTERS, "the adapters")
    read = [read_adapter(folder, name) for name, folder in named_folders(adapters, names).items()]
    shapes = module_shapes(model)
    for adapter in read:
        refuse_other_base(adapter, shapes)
    _warn_of_other_bases(read)
    saved = saved_modules(model, read, saved_from)
    if train == "router" and len(read) == 1:
        raise nothing_to_train()
    config = LoraMoeConfig(
        **{
            "task_type": _shared_task_type(read),
            "balance_loss": None,
            **options,
            "allocation": import_plan(read, shapes, top_k),
            "router": router,
            "train": train,
            "expert_names": [adapter.name for adapter in read],
            "modules_to_save": saved.modules or None,
        }
    )
    mixture: Any = get_peft_model(model, config, adapter_name=adapter_name)
    for module in mixture.modules():
        if isinstance(module, LoraMoeLayer) and adapter_name in module.molora_A:
            _fill(module, adapter_name, [adapter.pairs.get(module.name) for adapter in read])
    write_saved(mixture, saved, adapter_name)
    return mixture  # type: ignore[no-any-return]


def named_folders(adapters: Adapters, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Adapter folders by name, in their order.

    Raises:
        GuilomoError: there are none, or names are missing, empty or equal.
    """
    if isinstance(adapters, (str, os.PathLike)):
        raise invalid(
            "adapters", os.fspath(adapters), "several folders", "Put it into a list, or use adapters_in(folder)."
        )
    if isinstance(adapters, Mapping):
        if names is not None:
            raise invalid("names", list(names), "unset where the adapters come with names")
        names, folders = list(adapters), list(adapters.values())
    else:
        folders = list(adapters)
        names = [Path(folder).name for folder in folders] if names is None else list(names)
    if not folders:
        raise invalid("adapters", folders, "at least one adapter folder")
    if len(names) != len(folders) or len(set(names)) < len(names) or not all(names):
        raise invalid("names", names, f"{len(folders)} different names, one per adapter", "Set names=[...].")
    return {name: Path(folder) for name, folder in zip(names, folders, strict=True)}


def import_plan(adapters: Sequence[LoraAdapter], shapes: Mapping[str, tuple[int, int]], top_k: int) -> Allocation:
    """The plan of a mixture of `adapters`: each module that any of them changes, with an expert for every adapter.

    Raises:
        GuilomoError: top_k is below 1.
    """
    if not isinstance(top_k, int) or top_k < 1:
        raise invalid("top_k", top_k, "a whole number of at least 1")
    chosen = min(top_k, len(adapters))
    modules = {
        module: ModulePlan(*shape, tuple(_rank(adapter.pairs.get(module)) for adapter in adapters), chosen)
        for module, shape in shapes.items()
        if any(module in adapter.pairs for adapter in adapters)
    }
    return Allocation(modules, scaling="constant", alpha=1.0, strategy="imported adapters")


def _rank(pair: LoraPair | None) -> int:
    # A plan has no experts of rank 0.
    return 1 if pair is None else pair.rank


@torch.no_grad()
def _fill(layer: LoraMoeLayer, name: str, pairs: Sequence[LoraPair | None]) -> None:
    """Writes the factors into one module's experts."""
    a, b = layer.molora_A[name], layer.molora_B[name]
    start = 0
    for pair in pairs:
        rows = slice(start, start + _rank(pair))
        a[rows] = 0 if pair is None else pair.a.to(a)
        b[:, rows] = 0 if pair is None else _scaled(pair).to(b)
        start = rows.stop


def _scaled(pair: LoraPair) -> Tensor:
    """``scale * b``; the product is rounded only when it is written into the mixture."""
    return pair.b if pair.scale == 1 else pair.b.double() * pair.scale


def _shared_task_type(adapters: Sequence[LoraAdapter]) -> Any:
    kinds = {adapter.config.task_type for adapter in adapters}
    return kinds.pop() if len(kinds) == 1 else None


def _warn_of_other_bases(adapters: Sequence[LoraAdapter]) -> None:
    """Shapes cannot tell two fine-tuned models of one family apart, and a folder may have moved: no error."""
    bases = {adapter.config.base_model_name_or_path for adapter in adapters} - {None}
    if len(bases) > 1:
        warnings.warn(
            f"The adapters name different base models: {', '.join(sorted(map(str, bases)))}. Each works as alone only "
            "on the weights that it was trained on.",
            stacklevel=3,
        )
