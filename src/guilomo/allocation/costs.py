"""Exact parameter and FLOP counts of a module, with the router's share as a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from guilomo.allocation.modules import OUT, ROUTE, ModulePlan

RouterCost = Callable[[int, int], int]
"""(experts E, in_features I) -> trainable parameters of the module's router.

It may have a method ``shared``, see `shared_parameters`."""


def linear_router(experts: int, in_features: int) -> int:
    """E*I: one bias-free linear per module (MoLA, GuiLoMo). One expert always has gate 1 and needs no router."""
    return experts * in_features if experts > 1 else 0


def no_router(experts: int, in_features: int) -> int:
    """0: routing without parameters (fixed gates, plain LoRA)."""
    return 0


def expert_parameters(plan: ModulePlan) -> int:
    """R*I + R*O: the packed A (R, I) and B (O, R); with a shared A (r, I) it is r*I + R*O.

    A sequential branch adds 2 r_b O: C (r_b, O) and D (O, r_b).
    """
    sequential = 2 * plan.sequential_rank * plan.out_features
    return plan.rows_of_a * plan.in_features + plan.rank * plan.out_features + sequential


def router_parameters(plan: ModulePlan, router: RouterCost = linear_router) -> int:
    """The router's parameters; 0 for a module that is not adapted, or that another one of its block routes."""
    return router(plan.experts, plan.in_features) if plan.adapted and plan.role in ("", ROUTE) else 0


def shared_parameters(modules: Iterable[tuple[int, int]], router: RouterCost) -> int:
    """What the routers of modules with these ``(E, I)`` hold in common, counted once (LD-MoLE, arXiv 2509.25684).

    0 unless the router's cost has a method ``shared`` that says otherwise.
    """
    shared: Callable[[list[tuple[int, int]]], int] | None = getattr(router, "shared", None)
    return 0 if shared is None else shared(list(modules))


def module_parameters(plan: ModulePlan, router: RouterCost = linear_router) -> int:
    """Trainable parameters of one module: A, B and the router (MoLA section 3; the formula of most LoRA-MoEs)."""
    return expert_parameters(plan) + router_parameters(plan, router)


def module_active_parameters(plan: ModulePlan, router: RouterCost = linear_router) -> float:
    """Parameters one token uses: K/E of the expert parameters, all of a shared A, and the router.

    With mixed ranks this is the mean over experts, that is the expectation under uniform routing.
    """
    share = plan.top_k / plan.experts if plan.experts > 1 else 1.0
    common = plan.rows_of_a * plan.in_features if plan.shared_a else 0
    return common + share * (expert_parameters(plan) - common) + router_parameters(plan, router)


def module_flops(plan: ModulePlan, router: RouterCost = linear_router) -> int:
    """Forward FLOPs per token of packed evaluation, which computes all R rows whatever the routing chose.

    2 per multiply-add over A, B and the router, taken to use each of its parameters once, those that it shares with
    other modules included. The R products with the gate and the softmax over E are left out: both are thousands of
    times smaller.

    In a feed-forward block all R rows of A or B that meet the K copies of a token are used K times.
    """
    shared = shared_parameters([(plan.experts, plan.in_features)] if plan.routes else [], router)
    if not plan.role:
        return 2 * (module_parameters(plan, router) + shared)
    copies_in, copies_out = (plan.top_k, 1) if plan.role == OUT else (1, plan.top_k)
    rows = copies_in * plan.rows_of_a * plan.in_features + copies_out * plan.rank * plan.out_features
    return 2 * (rows + router_parameters(plan, router) + shared)
