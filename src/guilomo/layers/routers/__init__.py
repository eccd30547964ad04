"""The routers, by the name that the configuration uses. A new router is one file here and one line below."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from guilomo.errors import unknown
from guilomo.layers.options import completed, defaults_of
from guilomo.layers.routers.dense import DenseRouter
from guilomo.layers.routers.fixed import FixedRouter
from guilomo.layers.routers.flylora import FlyLoraRouter
from guilomo.layers.routers.hmora import HmoraRouter
from guilomo.layers.routers.lora_mixer import LoraMixerRouter
from guilomo.layers.routers.loss_free import LossFreeRouter
from guilomo.layers.routers.meteora import MeteoraRouter
from guilomo.layers.routers.sinkhorn import SinkhornRouter
from guilomo.layers.routers.sparsegen import SparsegenRouter
from guilomo.layers.routers.task import TaskRouter
from guilomo.layers.routers.threshold import ThresholdRouter
from guilomo.layers.routers.top_p import TopPRouter
from guilomo.layers.routers.topk import TopKRouter
from guilomo.layers.routers.topk_of_softmax import TopKOfSoftmaxRouter
from guilomo.layers.routing import Router

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "topk_of_softmax": TopKOfSoftmaxRouter,
    "dense": DenseRouter,
    "fixed": FixedRouter,
    "sparsegen": SparsegenRouter,
    "threshold": ThresholdRouter,
    "top_p": TopPRouter,
    "sinkhorn": SinkhornRouter,
    "task": TaskRouter,
    "meteora": MeteoraRouter,
    "lora_mixer": LoraMixerRouter,
    "hmora": HmoraRouter,
    "loss_free": LossFreeRouter,
    "flylora": FlyLoraRouter,
}


def router_class(name: str) -> type[Router]:
    """The router registered as `name`; an unknown name is an error that proposes the nearest one."""
    if name not in ROUTERS:
        raise unknown("router", name, ROUTERS)
    return ROUTERS[name]


def router_options(name: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """All options of the named router, those not given at their defaults.

    Raises:
        GuilomoError: no such router or option, or a value that cannot work.
    """
    kind = router_class(name)
    found = completed("router_options", f"router={name!r}", options or {}, defaults_of(kind))
    kind.check_options(**found)
    return found


@dataclass(frozen=True)
class RouterPrice:
    """Trainable parameters of a router under all its options, as plans and budgets ask for them."""

    kind: type[Router]
    options: dict[str, Any]

    def __call__(self, experts: int, in_features: int) -> int:
        """Of one module; one expert has no router. Shared parts are not counted."""
        return self.kind.parameters_for(experts, in_features, **self.options) if experts > 1 else 0

    def shared(self, modules: Iterable[tuple[int, int]]) -> int:
        """Of what the routers of modules with these ``(experts, in_features)`` have in common, each part once."""
        parts = {self.kind.shared_key(*module): module for module in modules if module[0] > 1}
        found = (
            self.kind.shared_parameters(*module, **self.options) for key, module in parts.items() if key is not None
        )
        return sum(found)


def cost_of_router(name: str, options: dict[str, Any] | None = None) -> RouterPrice:
    """What the named router costs, as a function of ``(experts, in_features)``."""
    return RouterPrice(router_class(name), router_options(name, options))


__all__ = [
    "ROUTERS",
    "DenseRouter",
    "FixedRouter",
    "FlyLoraRouter",
    "HmoraRouter",
    "LoraMixerRouter",
    "LossFreeRouter",
    "MeteoraRouter",
    "RouterPrice",
    "SinkhornRouter",
    "SparsegenRouter",
    "TaskRouter",
    "ThresholdRouter",
    "TopKOfSoftmaxRouter",
    "TopKRouter",
    "TopPRouter",
    "cost_of_router",
    "router_class",
    "router_options",
]
