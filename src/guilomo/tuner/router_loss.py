"""The auxiliary loss of a module or of a whole layer, as the config names it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from guilomo.layers.balance import RouterStatistics, balance_loss, own_loss, read_by, z_loss
from guilomo.tuner.config import LoraMoeConfig
from guilomo.tuner.context import RoutingContext


@dataclass(frozen=True)
class RouterLoss:
    """``balance_coefficient * balance + z_coefficient * z + own_coefficient * own`` over a group of modules.

    Attributes:
        group: name of the group; modules of one group are balanced together.
        members: how many routed modules the group has. The last of them to run carries the loss, by when the
            statistics of all are there; the gradient reaches the others through their part of the sum.
        form: name of the balance loss, or None.
        share: 1 for a sum over groups, 1 / number of groups for a mean.
        own_coefficient: of the mean of the routers' own loss, see `Routing.penalty`.
        balance_options: of the form.
        reads: the router statistics that it is made of.
    """

    group: str
    members: int
    form: str | None
    balance_coefficient: float
    z_coefficient: float
    share: float
    own_coefficient: float = 0.0
    balance_options: dict[str, Any] = field(default_factory=dict)
    reads: frozenset[str] = field(init=False)

    @property
    def active(self) -> bool:
        balances = self.form is not None and self.balance_coefficient > 0
        return balances or self.z_coefficient > 0 or self.own_coefficient > 0

    def __post_init__(self) -> None:
        form = self.form if self.balance_coefficient > 0 else None
        object.__setattr__(self, "reads", read_by(form, self.z_coefficient > 0, self.own_coefficient > 0))

    def __call__(self, context: RoutingContext, statistics: RouterStatistics) -> Tensor | None:
        """The weighted loss ``()`` if this module completes its group, else None."""
        if self.members > 1:
            ran = context.pending.setdefault(self.group, [])
            ran.append(statistics)
            if len(ran) < self.members:
                return None
            del context.pending[self.group]
            statistics = ran[0]
            for other in ran[1:]:
                statistics = statistics + other
        if context.total is not None:
            statistics = context.total(statistics)
        parts = []
        if self.z_coefficient > 0:
            parts.append(self.z_coefficient * self.share * z_loss(statistics))
        if self.form is not None and self.balance_coefficient > 0:
            loss = balance_loss(self.form, statistics, **self.balance_options)
            parts.append(self.balance_coefficient * self.share * loss)
        if self.own_coefficient > 0:
            parts.append(self.own_coefficient * self.share * own_loss(statistics))
        return sum(parts[1:], parts[0])


def router_losses(config: LoraMoeConfig, groups: dict[str, list[str]], adapter: str) -> dict[str, RouterLoss]:
    """The loss of every routed module.

    Args:
        config: names the form, coefficients and reduction.
        groups: group name to the routed modules balanced together.
        adapter: its name; two adapters that are active together must not fill each other's groups.
    """
    share = 1.0 if config.balance_reduction == "sum" else 1.0 / max(len(groups), 1)
    return {
        module: RouterLoss(
            group=f"{adapter}: {group}",
            members=len(modules),
            form=config.balance_loss,
            balance_coefficient=config.balance_coefficient,
            z_coefficient=config.z_loss_coefficient,
            share=share,
            own_coefficient=config.router_loss_coefficient,
            balance_options=config.balance_options,
        )
        for group, modules in groups.items()
        for module in modules
    }
