"""Turns a config into the plan in force for one model."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from torch import nn

from guilomo.allocation import Allocation, ModulePlan, ModuleShape, layers_of
from guilomo.allocation.blocks import FEED_FORWARDS, find_blocks, with_roles
from guilomo.allocation.modules import plan_module
from guilomo.errors import GuilomoError, invalid
from guilomo.layers.routers import router_class
from guilomo.tuner.config import LoraMoeConfig
from guilomo.tuner.modules import adaptable_modules, target_shapes


def resolve_allocation(model: nn.Module, config: LoraMoeConfig) -> Allocation:
    """The allocation that `config` means for `model`.

    Raises:
        GuilomoError: the config's allocation names modules the model lacks or has in another shape; a pattern matches
            nothing; a module cannot have what is asked.
    """
    plan = config.plan
    if plan is None:
        plan = _plan_from_fields(target_shapes(model, config), config, adaptable_modules(model))
    else:
        shapes = adaptable_modules(model)
        _refuse_unknown(plan, shapes)
        plan.check_against({name: shape for name, shape in shapes.items() if name in plan.modules})
        _refuse_other_structure(plan, config)
    if not plan.adapted():
        raise GuilomoError(
            "The allocation gives no experts to any module, so there is nothing to train. "
            "Give at least one module a non-empty list of ranks."
        )
    _refuse_one_expert_per_token(plan, config)
    _refuse_wide_experts(plan, config.router)
    return plan_for_router(plan, config.router)


def _refuse_one_expert_per_token(plan: Allocation, config: LoraMoeConfig) -> None:
    """With K = 1 the weight is the probability itself, and would scale down the frozen feed-forward with its expert."""
    for name, module in plan.adapted().items():
        if module.role and module.top_k == 1 and config.router == "topk":
            remedy = "Choose top_k of at least 2, so that the weights sum to 1 and training starts at the base model."
            raise invalid(f"top_k of {name}", 1, "at least 2 in a feed-forward block", remedy)


def plan_for_router(plan: Allocation, router: str) -> Allocation:
    """The plan with top-k as the router has it: dense routers choose every expert, whatever the plan says."""
    if not router_class(router).dense:
        return plan
    everyone = {n: replace(m, top_k=m.experts) if m.ranks else m for n, m in plan.modules.items()}
    return replace(plan, modules=everyone)


def _refuse_wide_experts(plan: Allocation, router: str) -> None:
    """A router that reads rank activations has one for each expert."""
    if not router_class(router).reads_ranks:
        return
    for name, module in plan.adapted().items():
        if module.experts > 1 and max(module.ranks) > 1:
            allowed = f"rank 1 for every expert with router={router!r}"
            raise invalid(f"ranks of module {name!r}", module.ranks, allowed, "Set r=1, and num_experts to the rank.")


def _refuse_unknown(plan: Allocation, shapes: dict[str, ModuleShape]) -> None:
    """A plan may leave linears of the model out, but what it names must be one of them."""
    for name in plan.modules:
        if name not in shapes:
            near = get_close_matches(name, list(shapes), n=1, cutoff=0.5)
            remedy = f"Did you mean {near[0]!r}?" if near else "Remove it, or load the model the plan was made for."
            raise invalid("allocation module", name, f"one of the model's {len(shapes)} linear layers", remedy)


def _refuse_other_structure(plan: Allocation, config: LoraMoeConfig) -> None:
    """What the config asks for beside a plan must be what the plan says, for the plan has the last word."""
    for name, module in plan.adapted().items():
        if config.shared_a and module.experts > 1 and not module.shared_a:
            remedy = "Give it guilomo.allocation.with_shared_a(plan), or leave shared_a out."
            raise invalid("shared_a", True, f"False, for the allocation gives {name!r} an A for every expert", remedy)
    several = any(module.experts > 1 for module in plan.modules.values())
    if config.feed_forward_experts and several and not any(module.role for module in plan.modules.values()):
        remedy = "Give the allocation's modules their role and block, or leave feed_forward_experts out."
        raise invalid("feed_forward_experts", True, "False, for the allocation has no feed-forward block", remedy)
    if config.sequential_rank and not any(module.sequential_rank for module in plan.modules.values()):
        remedy = "Give the allocation's modules their sequential_rank, or leave it out here."
        raise invalid("sequential_rank", config.sequential_rank, "0, for the allocation has no such branch", remedy)


def _blocks(linears: Collection[str], config: LoraMoeConfig) -> dict[str, tuple[str, ...]]:
    if not config.feed_forward_experts:
        return {}
    return find_blocks(linears, config.feed_forward_blocks or FEED_FORWARDS)


def _plan_from_fields(shapes: dict[str, ModuleShape], config: LoraMoeConfig, linears: Collection[str]) -> Allocation:
    """``num_experts`` experts of rank ``r`` everywhere, changed by ``rank_pattern``."""
    _refuse_unmatched(config.rank_pattern, shapes)
    blocks = _blocks(linears, config)
    inside = {name for members in blocks.values() for name in members}
    experts = {name: config.num_experts if name in inside or not config.feed_forward_experts else 1 for name in shapes}
    modules = {name: _module_plan(name, shape, config, experts[name]) for name, shape in shapes.items()}
    if config.feed_forward_experts:
        modules = with_roles(modules, blocks)
    return Allocation(modules, scaling=config.scaling, alpha=config.lora_alpha, strategy="config")


def _module_plan(name: str, shape: ModuleShape, config: LoraMoeConfig, experts: int) -> ModulePlan:
    asked = next((v for p, v in config.rank_pattern.items() if _matches(p, name)), config.r)
    sequential = 0 if asked == [] else config.sequential_rank
    ranks = () if asked == 0 and sequential else tuple(_ranks(name, asked, experts))
    top_k = min(config.top_k, len(ranks)) if ranks else config.top_k
    return plan_module(name, shape, ranks, top_k, shared_a=config.shared_a, sequential_rank=sequential)


def _ranks(name: str, asked: Any, experts: int) -> list[int]:
    if isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1:
        return [asked] * experts
    if isinstance(asked, (list, tuple)) and all(isinstance(r, int) and r >= 1 for r in asked):
        return list(asked)
    raise invalid(f"rank_pattern for {name}", asked, "a rank of at least 1, or a list of such ranks ([] = not adapted)")


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _refuse_unmatched(patterns: dict[str, Any], shapes: dict[str, ModuleShape]) -> None:
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in shapes):
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in shapes}))
            raise invalid("rank_pattern", pattern, f"a pattern that matches a targeted module (they end in {kinds})")


def balance_groups(plan: Allocation, over: str) -> dict[str, list[str]]:
    """The routed modules that are balanced together: each alone, or those of one layer.

    Loads can be added only where the experts are as many, so a layer with several expert counts has a group for each.
    Modules outside the layers (a pooler) stay alone: gradient checkpointing recomputes layer by layer, and a group must
    not reach across.
    """
    routed = [name for name, module in plan.adapted().items() if module.routes]
    if over == "module":
        return {name: [name] for name in routed}
    groups: dict[str, list[str]] = {}
    for name, layer in layers_of(plan.modules).items():
        if name in routed:
            groups.setdefault(f"layer {layer}, {plan[name].experts} experts", []).append(name)
    return groups
