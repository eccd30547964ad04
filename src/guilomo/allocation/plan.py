"""The allocation: for every module the ranks of its experts, top-k and scaling."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from guilomo.allocation.blocks import check_blocks
from guilomo.allocation.check import check_budget, check_shapes
from guilomo.allocation.codec import allocation_to_dict, allocation_to_json, fields_from_dict, parse_json
from guilomo.allocation.costs import (
    RouterCost,
    linear_router,
    module_active_parameters,
    module_flops,
    module_parameters,
    shared_parameters,
)
from guilomo.allocation.frozen import FrozenDict
from guilomo.allocation.modules import ModulePlan, ModuleShape
from guilomo.allocation.views import ModuleChange, changes, describe_changes, module_rows, plain_table
from guilomo.errors import GuilomoError, invalid, unknown

__all__ = ["SCALINGS", "Allocation", "ModuleChange", "ModulePlan", "ModuleShape"]

SCALINGS: Mapping[str, Callable[[float, int], float]] = {
    "alpha_over_r": lambda alpha, rank: alpha / rank,
    "alpha_over_sqrt_r": lambda alpha, rank: alpha / math.sqrt(rank),
    "constant": lambda alpha, rank: alpha,
}
"""How an expert's output is scaled: LoRA, rank-stabilised LoRA, or alpha itself."""


@dataclass(frozen=True)
class Allocation:
    """How many experts every module gets, and which rank each expert has.

    Attributes:
        modules: dotted module path -> its plan; read-only.
        scaling: one of SCALINGS.
        alpha: numerator of the scale.
        strategy: where the plan came from, free text.

    Raises:
        GuilomoError: a name, plan, scaling or alpha cannot be used.
    """

    modules: Mapping[str, ModulePlan]
    scaling: str = "alpha_over_r"
    alpha: float = 16.0
    strategy: str = "explicit"

    def __post_init__(self) -> None:
        if not isinstance(self.modules, Mapping):
            raise invalid("modules", self.modules, "a mapping of dotted module names to ModulePlan")
        for name, plan in self.modules.items():
            if not isinstance(name, str) or not name:
                raise invalid("module name", name, "a dotted path such as 'encoder.layer.0.attention.self.query'")
            if not isinstance(plan, ModulePlan):
                raise invalid(f"module {name!r}", plan, "a ModulePlan", "Read plans from JSON with from_dict.")
        if not isinstance(self.strategy, str):
            raise invalid("strategy", self.strategy, "text that says where the plan came from")
        check_blocks(self.modules)
        if self.scaling not in SCALINGS:
            raise unknown("scaling", str(self.scaling), SCALINGS)
        object.__setattr__(self, "modules", FrozenDict(self.modules))
        object.__setattr__(self, "alpha", _positive_float("alpha", self.alpha))

    def __getitem__(self, module: str) -> ModulePlan:
        """The plan of one module.

        Raises:
            GuilomoError: no such module.
        """
        if module not in self.modules:
            raise unknown("module", module, self.modules)
        return self.modules[module]

    def adapted(self) -> dict[str, ModulePlan]:
        """The modules that have experts."""
        return {name: plan for name, plan in self.modules.items() if plan.adapted}

    def scales(self, module: str) -> tuple[float, ...]:
        """One scale per expert of the module, length E: its own rank decides, never a neighbour's."""
        scale = SCALINGS[self.scaling]
        return tuple(scale(self.alpha, rank) if rank else 0.0 for rank in self[module].ranks)

    def sequential_scale(self, module: str) -> float:
        """Scale of the module's sequential branch, of its own rank; 0 without one."""
        rank = self[module].sequential_rank
        return SCALINGS[self.scaling](self.alpha, rank) if rank else 0.0

    def shapes(self) -> dict[str, ModuleShape]:
        """(I, O) of every module, adapted or not."""
        return {name: plan.shape for name, plan in self.modules.items()}

    def parameters(self, router: RouterCost = linear_router) -> int:
        """Trainable parameters, routers included."""
        return sum(module_parameters(plan, router) for plan in self.modules.values()) + self._shared(router)

    def _shared(self, router: RouterCost) -> int:
        return shared_parameters([(p.experts, p.in_features) for p in self.adapted().values() if p.routes], router)

    def active_parameters(self, router: RouterCost = linear_router) -> float:
        """Parameters one token uses: K/E of each module's experts, plus all routers."""
        own = math.fsum(module_active_parameters(plan, router) for plan in self.modules.values())
        return own + self._shared(router)

    def flops_per_token(self, router: RouterCost = linear_router) -> int:
        """Forward FLOPs per token that the adapters add in packed evaluation."""
        return sum(module_flops(plan, router) for plan in self.modules.values())

    def check_against(
        self,
        shapes: Mapping[str, tuple[int, int]],
        budget: int | None = None,
        router: RouterCost = linear_router,
    ) -> None:
        """Checks that the plan fits a model: the same module names with the same (I, O), and the budget, if given.

        Raises:
            GuilomoError: names the module at fault, the value and the remedy.
        """
        check_shapes(self.modules, shapes)
        if budget is not None:
            check_budget(self.parameters(router), budget)

    def diff(self, other: Allocation) -> list[ModuleChange]:
        """The modules planned differently in `other`, in order of appearance; absent modules show as None."""
        return changes(self.modules, other.modules)

    def describe_diff(self, other: Allocation) -> str:
        """The differences to `other` as text, one line per module."""
        return describe_changes(self.diff(other))

    def rows(self, router: RouterCost = linear_router) -> list[dict[str, Any]]:
        """One record per module: module, layer, projection, experts, ranks, top_k, parameters, active_parameters."""
        return module_rows(self.modules, router)

    def table(self, router: RouterCost = linear_router) -> str:
        """The plan as an aligned plain-text table with a line of totals."""
        return plain_table(self.rows(router))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` gives an equal plan back."""
        return allocation_to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Allocation:
        """The plan written by `to_dict` or by hand.

        Raises:
            GuilomoError: unknown or missing keys, or values the plan cannot have.
        """
        return cls(**fields_from_dict(data))

    def to_json(self) -> str:
        """JSON text with one line per module."""
        return allocation_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Allocation:
        """The plan written by `to_json`.

        Raises:
            GuilomoError: not JSON, a module named twice, or as from_dict.
        """
        return cls.from_dict(parse_json(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON text to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Allocation:
        """Reads a file written by `save`.

        Raises:
            GuilomoError: the file does not hold a plan; its path is named.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except GuilomoError as error:
            raise GuilomoError(f"{os.fspath(path)}: {error}") from None


def _positive_float(field: str, value: Any) -> float:
    """`value` as a float; GuilomoError unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise invalid(field, value, "a finite number above 0")
    return float(value)
