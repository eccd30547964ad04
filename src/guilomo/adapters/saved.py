"""What adapters hold besides low-rank changes: modules that were trained whole, and copies of embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from guilomo.adapters.lora import PREFIX, LoraAdapter
from guilomo.errors import GuilomoError, invalid, unknown


@dataclass(frozen=True)
class SavedModules:
    """Modules that are trained whole.

    Attributes:
        modules: names as in `modules_to_save`. tensors: their parameters by the base model's names.
    """

    modules: list[str]
    tensors: dict[str, Tensor]


def saved_modules(model: nn.Module, adapters: Sequence[LoraAdapter], saved_from: str | None) -> SavedModules:
    """The modules trained whole that a mixture of `adapters` takes over.

    Those of one adapter named by `saved_from`, or those of all where they are equal bit for bit. Copies of the base
    model's own weights, which PEFT saves beside an adapted output layer, are left out.

    Raises:
        GuilomoError: they differ and no adapter is named; no adapter is called so; an adapter holds changed weights of
            a module that it does not name in `modules_to_save`.
    """
    by_name = {adapter.name: _trained(model, adapter) for adapter in adapters}
    if saved_from is not None:
        if saved_from not in by_name:
            raise unknown("saved_from", saved_from, by_name)
        return by_name[saved_from]
    first, *rest = by_name.items()
    for name, saved in rest:
        if not _equal(first[1].tensors, saved.tensors):
            modules = sorted({*first[1].modules, *saved.modules})
            raise GuilomoError(
                f"Adapters {first[0]!r} and {name!r} differ in modules trained whole ({', '.join(modules)}), and a "
                f"mixture has one of each. Name the adapter to take them from: saved_from={first[0]!r}."
            )
    return first[1]


def write_saved(mixture: PeftModel, saved: SavedModules, adapter_name: str) -> None:
    """Writes them into the mixture's own copies."""
    for key, tensor in saved.tensors.items():
        module, _, parameter = key.rpartition(".")
        owner = _owner(mixture, module, saved.modules)
        inside = f"{module.removeprefix(owner).removeprefix('.')}.{parameter}".removeprefix(".")
        wrapper: Any = mixture.get_submodule(PREFIX + owner)
        target = dict(wrapper.modules_to_save[adapter_name].named_parameters())[inside]
        with torch.no_grad():
            target.copy_(tensor)


def _trained(model: nn.Module, adapter: LoraAdapter) -> SavedModules:
    named = list(dict.fromkeys(adapter.config.modules_to_save or ()))
    weights = model.state_dict()
    tensors = {}
    for key, tensor in adapter.others.items():
        if _named(key, named):
            _refuse_other_shape(adapter.name, key, tensor, weights.get(key))
            tensors[key] = tensor
        elif not _is_copy(tensor, weights.get(key.replace(".base_layer.", "."))):
            raise GuilomoError(
                f"adapter {adapter.name!r} holds weights of {key!r} that are not the base model's, and does not name "
                "the module in modules_to_save. Load the model it was trained on, or train the adapter without them."
            )
    kept = [name for name in named if any(_named(key, [name]) for key in tensors)]
    return SavedModules(kept, tensors)


def _refuse_other_shape(name: str, key: str, tensor: Tensor, weight: Tensor | None) -> None:
    if weight is None or weight.shape != tensor.shape:
        allowed = "a parameter of the model" if weight is None else f"{tuple(weight.shape)}"
        remedy = "Load the model it was trained on, with as many labels."
        raise invalid(f"adapter {name!r}: shape of {key!r}", tuple(tensor.shape), allowed, remedy)


def _named(key: str, modules: Sequence[str]) -> bool:
    """Whether a parameter lies in a module whose path ends in one of the names, as PEFT matches them."""
    parts = key.split(".")
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts)) for name in modules)


def _owner(mixture: PeftModel, module: str, names: Sequence[str]) -> str:
    parts = module.split(".")
    paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return next(path for path in paths if any(path.endswith(name) for name in names))


def _is_copy(tensor: Tensor, weight: Tensor | None) -> bool:
    return weight is not None and weight.shape == tensor.shape and bool((weight.cpu().to(tensor) == tensor).all())


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
