"""What a method is: which router, which structure of experts, which allocation, and where that comes from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

MATURITIES = ("stable", "experimental")
"""stable: the published rule is known and tested; experimental: something in it is remembered, second-hand or ours."""


PARTS = "PARTS"
"""Stands for the number of tasks that a mixed task has."""


@dataclass(frozen=True)
class Method:
    """One method of the family.

    Attributes:
        name: as recipes and the command line call it.
        label: as reports call it.
        summary: one line.
        paper: title or name with its arXiv id; "" for what is ours.
        maturity: see `MATURITIES`. note: what is uncertain, or ours.
        knobs: what the budget of parameters is spent on, in words.
        strategy: the allocation strategy that plans it; "" if it is planned by `grows`.
        mixture: the fields of the recipe's ``mixture`` that make the method what it is.
        mixed: the fields in which that differs where several tasks are trained as one; `PARTS` is their number.
        experts: how many experts it starts with, where `grows` plans it. expert_per_part: or one for each such task.
        grows: what a larger budget buys: "rank" of every expert, or "experts" of rank 1.
        share: K as a share of the experts, where the budget buys experts. scale_by: what the recipe's scale is divided
            by there, as published: "chosen" experts, or all "experts".
        needs: options that its row cannot do without, with an example of each.
        starts_from: the ready-made things that it starts from, "adapters" or "models"; "" for none. options: the
            default options of its row there (see `guilomo.run.ready_made`).
    """

    name: str
    label: str
    summary: str
    paper: str
    knobs: str
    maturity: str = "stable"
    note: str = ""
    strategy: str = ""
    mixture: dict[str, Any] = field(default_factory=dict)
    mixed: dict[str, Any] = field(default_factory=dict)
    experts: int | None = None
    expert_per_part: bool = False
    grows: str = ""
    share: float = 0.0
    scale_by: str = ""
    starts_from: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    needs: dict[str, Any] = field(default_factory=dict)

    def mixture_for(self, parts: int) -> dict[str, Any]:
        """The fields of `mixture` for a task of so many parts; 0: a single task."""
        return {**self.mixture, **_filled(self.mixed, parts)} if parts else self.mixture

    def experts_for(self, parts: int) -> int:
        """How many experts a plan of it starts with."""
        return parts if parts and self.expert_per_part else self.experts or 1

    @property
    def how_to_try(self) -> str:
        """The command that tries it on the packaged model and data."""
        if self.needs:
            return f"guilomo methods {self.name} --recipe > {self.name}.yaml; guilomo run {self.name}.yaml"
        rows = ",".join(dict.fromkeys(("lora", self.name)))
        return f"guilomo run --set methods=[{rows}] --set name=try-{self.name}"

    @property
    def facts(self) -> dict[str, str]:
        """What there is to know before one tries it, by the words that users see."""
        return {
            "paper": self.paper or "ours",
            "a budget buys": self.knobs,
            "maturity": self.maturity + (f": {self.note}" if self.note else ""),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, as ``guilomo methods --json`` prints it."""
        return {**asdict(self), "command": self.how_to_try}


def _filled(fields: dict[str, Any], parts: int) -> dict[str, Any]:
    return {k: _filled(v, parts) if isinstance(v, dict) else parts if v == PARTS else v for k, v in fields.items()}
