"""The computation of a mixture: packed experts, their naive twin, routers, balance losses, split batches."""

from guilomo.layers.balance import BALANCE_FORMS, RouterStatistics, balance_loss, router_statistics, z_loss
from guilomo.layers.finite import first_non_finite, remedy
from guilomo.layers.health import RouterHealth, router_health
from guilomo.layers.packed import ExpertLayout, packed_delta
from guilomo.layers.routers import ROUTERS, router_class
from guilomo.layers.routing import Router, Routing

__all__ = [
    "BALANCE_FORMS",
    "ROUTERS",
    "ExpertLayout",
    "Router",
    "RouterHealth",
    "RouterStatistics",
    "Routing",
    "balance_loss",
    "first_non_finite",
    "packed_delta",
    "remedy",
    "router_class",
    "router_health",
    "router_statistics",
    "z_loss",
]
