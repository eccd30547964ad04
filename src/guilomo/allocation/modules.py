"""What is planned for one adapted linear."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

from guilomo.errors import GuilomoError, invalid

ROUTE, IN, OUT = "route", "in", "out"
ROLES = ("", ROUTE, IN, OUT)
"""Of a feed-forward block, in the order of running: the first linear that reads x, others that do, the last one."""


class ModuleShape(NamedTuple):
    """Size of one linear: in_features I, out_features O (its weight is (O, I))."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class ModulePlan:
    """The experts of one linear.

    Attributes:
        in_features: I.
        out_features: O.
        ranks: rank of each expert, its length is E; empty means that the module is not adapted.
        top_k: K, how many experts a token uses.
        shared_a: all experts read one A of r rows (HydraLoRA, arXiv 2404.19245; MoSLD, arXiv 2412.08946).
        sequential_rank: r_b of a branch that reads the frozen linear's output, beside at most one expert (Hydra,
            arXiv 2309.06922); 0 for none.
        role: what the module does in a feed-forward block whose experts are weighted behind the nonlinearity (MixLoRA,
            arXiv 2404.15159), see `guilomo.allocation.blocks`; "" outside of one. In a block an expert may have rank 0.
        block: name of that block.

    Raises:
        GuilomoError: a size, a rank or top_k is not a positive integer, top_k exceeds the expert count, experts of
            different ranks would share one A, or a sequential branch would stand beside several experts.
    """

    in_features: int
    out_features: int
    ranks: tuple[int, ...] = ()
    top_k: int = 2
    shared_a: bool = False
    sequential_rank: int = 0
    role: str = ""
    block: str = ""

    def __post_init__(self) -> None:
        for field in ("in_features", "out_features", "top_k"):
            object.__setattr__(self, field, positive_int(field, getattr(self, field)))
        if isinstance(self.ranks, (int, str)):
            raise invalid("ranks", self.ranks, "a sequence with one rank per expert", "Write (8, 8) for 2 of rank 8.")
        if not isinstance(self.shared_a, bool):
            raise invalid("shared_a", self.shared_a, "True or False")
        if self.role not in ROLES or not isinstance(self.block, str) or bool(self.role) != bool(self.block):
            raise invalid("role", self.role, f"one of {ROLES[1:]} together with the name of a block, or neither")
        object.__setattr__(self, "ranks", tuple(self._rank(rank) for rank in self.ranks))
        if self.ranks and self.top_k > self.experts:
            remedy = "Lower top_k or give the module more experts."
            raise invalid("top_k", self.top_k, f"at most the expert count, {self.experts}", remedy)
        if self.sequential_rank != 0:
            positive_int("sequential_rank", self.sequential_rank)
        if self.sequential_rank and self.experts > 1:
            remedy = "Give the module one expert (num_experts=1, top_k=1), or leave sequential_rank out."
            raise invalid("sequential_rank", self.sequential_rank, f"0 beside {self.experts} experts", remedy)
        if self.shared_a and len(set(self.ranks)) > 1:
            remedy = "Give all experts of the module one rank, or set shared_a=False."
            raise invalid("ranks", self.ranks, "equal ranks where the experts share one A", remedy)

    def _rank(self, rank: Any) -> int:
        return 0 if self.role and isinstance(rank, int) and rank == 0 else positive_int("rank", rank)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """R, the packed rank: the sum of the expert ranks."""
        return sum(self.ranks)

    @property
    def rows_of_a(self) -> int:
        """Rows of A: R, or the one rank r that all experts have where they share it."""
        return self.ranks[0] if self.shared_a and self.ranks else self.rank

    @property
    def adapted(self) -> bool:
        """Whether the module has any expert, or a sequential branch."""
        return bool(self.ranks) or self.sequential_rank > 0

    @property
    def structured(self) -> bool:
        """Whether it is anything else than a plain mixture, each of whose experts has an A and a B of its own."""
        return self.shared_a or self.sequential_rank > 0 or bool(self.role)

    @property
    def routes(self) -> bool:
        """Whether it has a router: one per module with several experts, one per feed-forward block."""
        return self.experts > 1 and self.role in ("", ROUTE)

    @property
    def shape(self) -> ModuleShape:
        """(I, O)."""
        return ModuleShape(self.in_features, self.out_features)


def positive_int(field: str, value: Any) -> int:
    """`value` as a Python int (numpy integers included).

    Raises:
        GuilomoError: not an integer, a bool, or below 1.
    """
    number = operator.index(value) if hasattr(type(value), "__index__") and not isinstance(value, bool) else 0
    if number < 1:
        raise invalid(field, value, "an integer of at least 1", _remedy(field))
    return number


def _remedy(field: str) -> str:
    return "Leave ranks empty to leave the module unadapted." if field == "rank" else ""


def plan_module(name: str, shape: tuple[int, int], ranks: tuple[int, ...], top_k: int, **structure: Any) -> ModulePlan:
    """A ModulePlan whose errors also name the module; `structure` are its other fields.

    Raises:
        GuilomoError: as ModulePlan, prefixed with the module's name.
    """
    try:
        return ModulePlan(shape[0], shape[1], ranks, top_k, **structure)
    except GuilomoError as error:
        raise GuilomoError(f"module {name!r}: {error}") from None
