"""One adapter of one layer, as its computation needs it: what is looked up in every call, found once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from guilomo.allocation.plan import ModulePlan
from guilomo.layers.packed import ExpertLayout
from guilomo.layers.routers import TopKRouter
from guilomo.layers.routing import Router, Tokens
from guilomo.tuner.router_loss import RouterLoss

if TYPE_CHECKING:
    from guilomo.tuner.layer import LoraMoeLayer


class Mixture:
    """Its parts are registered in the layer, by the adapter's name; parameters are looked up there, since others
    replace them.

    Attributes:
        layer, adapter: whose it is. plan: of the module. layout, loss: see there.
        router: None for a single expert. top_k: the router if it is a plain `TopKRouter`, which most paths are for.
        drops: dropout modules of what can be dropped: "input", "rank" and "shared_a".
    """

    def __init__(
        self,
        layer: LoraMoeLayer,
        adapter: str,
        plan: ModulePlan,
        layout: ExpertLayout,
        router: Router | None,
        loss: RouterLoss,
        drops: dict[str, nn.Dropout],
    ) -> None:
        self.layer = layer
        self.adapter = adapter
        self.plan = plan
        self.layout = layout
        self.router = router
        self.top_k = router if type(router) is TopKRouter else None
        self.loss = loss
        self.drops = drops

    @property
    def a(self) -> Tensor:
        """``(R, I)``, or ``(r, I)`` where experts share it."""
        a: Tensor = self.layer.molora_A[self.adapter]
        return a

    @property
    def b(self) -> Tensor:
        """``(O, R)``"""
        b: Tensor = self.layer.molora_B[self.adapter]
        return b

    @property
    def score_rows(self) -> Tensor | None:
        """``(E, I)`` of a router whose logits are linear."""
        return None if self.router is None else self.router.score_rows

    def chance(self, what: str) -> float:
        """With which "input" features, "rank" activations or entries of a shared A are dropped now."""
        dropout = self.drops.get(what)
        return dropout.p if dropout is not None and self.layer.training else 0.0

    @property
    def drops_something(self) -> bool:
        return self.layer.training and any(dropout.p for dropout in self.drops.values())

    @property
    def is_searched(self) -> bool:
        """Whether masks, a split batch or second derivatives are in play."""
        context = self.layer.context
        return self.layer.name in context.masks or context.training_rows is not None or context.collected is not None

    def down(self) -> Tensor:
        """A; in training, where the config asks for it, the one sample of it that this pass uses (DropConnect)."""
        drop = self.chance("shared_a")
        return nn.functional.dropout(self.a, drop) if drop > 0 else self.a

    def tokens(self, x: Tensor) -> Tokens:
        """What the router may know of the tokens of x."""
        if self.router is None or not self.router.reads:
            return Tokens(x)
        context, reads = self.layer.context, self.router.reads
        real = context.counted(x) if "real" in reads else None
        return Tokens(x, real, context.tasks_for(x) if "task" in reads else None)
