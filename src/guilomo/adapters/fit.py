"""Does an adapter belong to a base model?"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from guilomo.adapters.lora import LoraAdapter
from guilomo.allocation import ModuleShape
from guilomo.errors import invalid
from guilomo.tuner import adaptable_modules


def module_shapes(model: nn.Module) -> dict[str, ModuleShape]:
    """``(I, O)`` of every linear of the base model by dotted path."""
    return adaptable_modules(model)


def refuse_other_base(adapter: LoraAdapter, shapes: Mapping[str, ModuleShape]) -> None:
    """Refuses an adapter that changes modules which the model lacks, or has in another shape.

    Raises:
        GuilomoError: names the adapter, the module and its shape.
    """
    base = adapter.config.base_model_name_or_path
    remedy = f"The adapter was trained on {base!r}: load that model." if base else "Load the model it was trained on."
    for module, pair in adapter.pairs.items():
        if module not in shapes:
            raise invalid(
                f"adapter {adapter.name!r}: module", module, f"one of the model's {len(shapes)} linears", remedy
            )
        found = (pair.a.shape[1], pair.b.shape[0])
        if found != tuple(shapes[module]):
            raise invalid(
                f"adapter {adapter.name!r}: (in, out) of {module!r}", found, f"{tuple(shapes[module])}", remedy
            )
