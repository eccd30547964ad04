"""The routers, by the name that the configuration uses. A new router is one file here and one line below."""

from __future__ import annotations

from guilomo.errors import unknown
from guilomo.layers.routers.dense import DenseRouter
from guilomo.layers.routers.fixed import FixedRouter
from guilomo.layers.routers.topk import TopKRouter
from guilomo.layers.routing import Router

ROUTERS: dict[str, type[Router]] = {"topk": TopKRouter, "dense": DenseRouter, "fixed": FixedRouter}


def router_class(name: str) -> type[Router]:
    """The router registered as `name`; an unknown name is an error that proposes the nearest one."""
    if name not in ROUTERS:
        raise unknown("router", name, ROUTERS)
    return ROUTERS[name]


__all__ = ["ROUTERS", "DenseRouter", "FixedRouter", "TopKRouter", "router_class"]
