"""The routers, by the name that the configuration uses. A new router is one file here and one line below."""

from __future__ import annotations

from collections.abc import Callable

from guilomo.errors import unknown
from guilomo.layers.routers.dense import DenseRouter
from guilomo.layers.routers.fixed import FixedRouter
from guilomo.layers.routers.topk import TopKRouter
from guilomo.layers.routers.topk_of_softmax import TopKOfSoftmaxRouter
from guilomo.layers.routing import Router

ROUTERS: dict[str, type[Router]] = {
    "topk": TopKRouter,
    "topk_of_softmax": TopKOfSoftmaxRouter,
    "dense": DenseRouter,
    "fixed": FixedRouter,
}


def router_class(name: str) -> type[Router]:
    """The router registered as `name`; an unknown name is an error that proposes the nearest one."""
    if name not in ROUTERS:
        raise unknown("router", name, ROUTERS)
    return ROUTERS[name]


def cost_of_router(name: str) -> Callable[[int, int], int]:
    """Trainable parameters of the named router as a function of ``(experts, in_features)``; one expert has none."""
    count = router_class(name).parameters_for
    return lambda experts, in_features: count(experts, in_features) if experts > 1 else 0


__all__ = [
    "ROUTERS",
    "DenseRouter",
    "FixedRouter",
    "TopKOfSoftmaxRouter",
    "TopKRouter",
    "cost_of_router",
    "router_class",
]
