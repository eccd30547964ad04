"""Does a plan fit a model?"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from guilomo.allocation.modules import ModulePlan
from guilomo.errors import invalid


def check_shapes(modules: Mapping[str, ModulePlan], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Compares planned modules with a model's linears, name -> (I, O).

    Raises:
        GuilomoError: a planned module is not in the model, a linear has no plan, or the sizes differ.
    """
    for name in modules:
        if name not in shapes:
            near = get_close_matches(name, list(shapes), n=1, cutoff=0.5)
            remedy = f"Did you mean {near[0]!r}?" if near else "Remove it from the plan."
            raise invalid("module", name, f"one of the model's {len(shapes)} linears", remedy)
    for name, shape in shapes.items():
        if name not in modules:
            remedy = f"Add {name!r} to the plan, with empty ranks to leave it unadapted."
            raise invalid(f"plan of module {name!r}", None, "one entry for every linear offered", remedy)
        if modules[name].shape != tuple(shape):
            remedy = "The plan was made for another model; make it again from this model's shapes."
            raise invalid(f"(in, out) of module {name!r}", tuple(modules[name].shape), f"{tuple(shape)}", remedy)


def check_budget(parameters: int, budget: int) -> None:
    """GuilomoError if the plan has more trainable parameters than the budget."""
    if parameters > budget:
        remedy = "Raise the budget, or project the plan onto it with fit(...)."
        raise invalid("trainable parameters", parameters, f"at most the budget, {budget}", remedy)
