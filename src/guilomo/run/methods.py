"""The methods of a comparison: the plan of each at the common budget, and its attachment to a model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from pydantic import ValidationError
from torch import nn

from guilomo.allocation import Allocation, ModuleShape, RouterCost
from guilomo.allocation.registry import make
from guilomo.allocation.uniform import uniform
from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.layers.routers import cost_of_router
from guilomo.methods import METHODS, filled_plan
from guilomo.methods.fit import more_rank, one_expert_more, with_top_k
from guilomo.run.bank_rows import ADAPTERS
from guilomo.run.config import PLAIN_LORA, RANDOM, SEARCHED, SHUFFLED, MethodConfig, MixtureConfig, RunConfig
from guilomo.run.expert_rows import MODELS
from guilomo.run.ready_made import ReadyMade
from guilomo.run.recipe import problems
from guilomo.search import search_sized
from guilomo.tasks import Task
from guilomo.tuner import LoraMoeConfig, plan_for_router, target_shapes
from guilomo.tuner.resolve import resolve_allocation

FROM_SEARCH = (SEARCHED, SHUFFLED)
"""The strategies whose plan is known only after the search."""
READY_MADE = {"adapters": ADAPTERS, "models": MODELS}
"""What rows can start from, by `Method.starts_from`."""
TASK_TYPES = {"classification": TaskType.SEQ_CLS, "causal_lm": TaskType.CAUSAL_LM, "lm": TaskType.CAUSAL_LM}


def ready_made(method: MethodConfig) -> ReadyMade | None:
    """What the row starts from; None for one whose plan is made at the budget."""
    return READY_MADE.get(METHODS[method.strategy].starts_from)


def check_methods(config: RunConfig) -> None:
    """Refuses unknown methods, and rows that cannot be, before anything is loaded."""
    for method in config.methods:
        known = METHODS.get(method.strategy)
        if known is None:
            raise unknown(f"strategy of method {method.name!r}", method.strategy, METHODS)
        if (things := ready_made(method)) is not None:
            things.check(method, config)
        if method.strategy == SHUFFLED and method.options:
            raise GuilomoError(
                f"Method {method.name!r} has options {sorted(method.options)}, but the shuffled plan takes none: it is "
                "the searched one. Leave them out."
            )
        if method.strategy == SEARCHED and method.options:
            raise GuilomoError(
                f"Method {method.name!r} has options {sorted(method.options)}, but the options of the searched method "
                "are the keys under search. Move them there."
            )
        _refuse_odd_experts(method)
        if known.grows and method.options.keys() - {"experts"}:
            raise unknown(f"option of method {method.name!r}", min(method.options.keys() - {"experts"}), ["experts"])
        if method.strategy in (*FROM_SEARCH, PLAIN_LORA) and method.mixture:
            raise GuilomoError(
                f"Method {method.name!r} has keys of mixture {sorted(method.mixture)}, but "
                + ("PEFT's LoRA has no mixture." if method.strategy == PLAIN_LORA else "the search is common to all.")
                + " Leave them out, or set them under mixture for the whole run."
            )
        _refuse_common_options(method)
        _refuse_fewer_than_parts(method, config)


def _refuse_common_options(method: MethodConfig) -> None:
    """What all methods share cannot be an option of one: the comparison would no longer be at one budget."""
    common = sorted({"budget", "router", "weights"} & method.options.keys())
    if common:
        raise GuilomoError(
            f"Method {method.name!r} has the option {common[0]!r}, which is common to all methods. "
            "Set budget.parameters or mixture.router instead."
        )


def _refuse_odd_experts(method: MethodConfig) -> None:
    experts = method.options.get("experts", 1)
    if METHODS[method.strategy].grows and (type(experts) is not int or experts < 1):
        raise invalid(f"options.experts of method {method.name!r}", experts, "a whole number of at least 1")


def _refuse_fewer_than_parts(method: MethodConfig, config: RunConfig) -> None:
    """Every part of a mixed task needs its place where tasks are read."""
    parts, mixture = len(config.task.parts), _checked_mixture(method, config)
    tasks = mixture.router_options.get("tasks", parts)
    if tasks < parts:
        field = f"router_options.tasks of method {method.name!r}"
        raise invalid(field, tasks, f"at least {parts}, the parts of the task")
    types = mixture.balance_options.get("types", 2)
    if mixture.balance_loss == "localized" and types < parts:
        field = f"balance_options.types of method {method.name!r}"
        raise invalid(field, types, f"at least {parts}, the parts of the task")


def _checked_mixture(method: MethodConfig, config: RunConfig) -> MixtureConfig:
    try:
        return config.mixture_of(method)
    except ValidationError as error:
        raise GuilomoError(f"Method {method.name!r}, mixture: " + "\n".join(problems(error, MixtureConfig))) from None


def _refuse_fewer_experts(plan: Allocation, method: MethodConfig, config: RunConfig) -> None:
    """In a hard stage every part of a mixed task has an expert, and in a localised balance a group of them."""
    parts, mixture = len(config.task.parts), config.mixture_of(method)
    options = mixture.router_options
    hard = options.get("hard_share") or options.get("stage") == "hard"
    if not parts or not (hard or mixture.balance_loss == "localized"):
        return
    routed = {name: module for name, module in plan.adapted().items() if module.routes}
    for name, module in (routed or plan.adapted()).items():
        if module.experts < parts:
            remedy = "Give the row more experts, or another router and balance loss."
            field = f"experts of method {method.name!r} in {name}"
            raise invalid(field, module.experts, f"at least {parts}, one for each part of the task", remedy)


def mixture_config(config: RunConfig, method: MethodConfig, **options: Any) -> LoraMoeConfig:
    """The PEFT config of a row's mixture."""
    settings = {**config.mixture_of(method).peft_options(), "task_type": TASK_TYPES[config.task.kind], **options}
    return LoraMoeConfig(**settings)


def search_mixture(config: RunConfig, task: Task) -> LoraMoeConfig:
    """The PEFT config of the over-provisioned mixture that the search starts from."""
    return search_sized(config.search, **config.mixture.peft_options(), task_type=TASK_TYPES[task.kind])


def model_shapes(model: nn.Module, config: RunConfig, task: Task) -> dict[str, ModuleShape]:
    """The modules of the model that the run adapts."""
    return target_shapes(model, search_mixture(config, task))


def router_cost(config: RunConfig, method: MethodConfig | None = None) -> RouterCost:
    """What the router of a row costs, or the run's."""
    mixture = config.mixture if method is None else config.mixture_of(method)
    return cost_of_router(mixture.router, mixture.router_options)


def resolve_budget(config: RunConfig, shapes: dict[str, ModuleShape]) -> tuple[int, str]:
    """The budget in parameters, and in words where it comes from."""
    wanted = config.budget
    if wanted.parameters is not None:
        return wanted.parameters, f"{wanted.parameters:,} parameters, as given"
    plan = uniform(shapes, experts=wanted.experts, rank=wanted.rank, top_k=min(config.mixture.top_k, wanted.experts))
    return plan.parameters(router_cost(config)), f"uniform {wanted.experts} experts × rank {wanted.rank}"


def plan_method(
    method: MethodConfig,
    config: RunConfig,
    model: nn.Module,
    shapes: dict[str, ModuleShape],
    budget: int,
    seed: int = 0,
) -> Allocation:
    """The allocation of a method that is not searched, at the common budget.

    The random control draws anew for every training seed, so that it is compared as a strategy, not as one lucky plan.
    """
    _refuse_common_options(method)
    plan = _plan_of(method, config, model, shapes, budget, seed)
    _refuse_fewer_experts(plan, method, config)
    return plan


def _plan_of(
    method: MethodConfig,
    config: RunConfig,
    model: nn.Module,
    shapes: dict[str, ModuleShape],
    budget: int,
    seed: int,
) -> Allocation:
    if METHODS[method.strategy].grows:
        return _grown_plan(method, config, model, budget)
    mixture = config.mixture_of(method)
    terms: dict[str, Any] = {"budget": budget, "alpha": mixture.alpha, "scaling": mixture.scaling}
    if method.strategy != PLAIN_LORA:
        terms |= {"router": router_cost(config, method), "top_k": mixture.top_k}
    if method.strategy == "uniform" and config.budget.parameters is None:
        # The plan that sets the budget is itself the uniform row, where it has enough experts for top-k.
        terms |= {"experts": max(config.budget.experts, mixture.top_k), "rank": config.budget.rank}
    if method.strategy == RANDOM:
        # The control draws from what the search may choose.
        space = config.search
        terms |= {"max_experts": space.max_experts, "max_rank": space.max_rank, "seed": seed}
        terms |= {"min_experts": space.least_experts, "top_k_floor": space.top_k_floor}
    if method.strategy == "alphalora" and "alphas" not in method.options:
        terms["weights"] = {name: model.get_parameter(f"{name}.weight").detach() for name in shapes}
    plan = make(method.strategy, shapes, **{**terms, **method.options})
    return plan if method.strategy == PLAIN_LORA else plan_for_router(plan, mixture.router)


def _grown_plan(method: MethodConfig, config: RunConfig, model: nn.Module, budget: int) -> Allocation:
    """The largest plan of the budget, of a method that is no plain mixture."""
    known = METHODS[method.strategy]
    experts = method.options.get("experts") or known.experts_for(len(config.task.parts))
    top_k = min(config.mixture_of(method).top_k, experts)
    least = resolve_allocation(model, mixture_config(config, method, num_experts=experts, r=1, top_k=top_k))
    grow = more_rank if known.grows == "rank" else one_expert_more
    plan = filled_plan(replace(least, strategy=known.name), budget, router_cost(config, method), grow)
    return with_top_k(plan, known.share, known.scale_by) if known.grows == "experts" else plan


def attach(model: nn.Module, plan: Allocation, method: MethodConfig, config: RunConfig, task: Task) -> PeftModel:
    """The model with the method's adapter, ready to train."""
    if method.strategy == PLAIN_LORA:
        return get_peft_model(model, plain_lora_config(plan, config, task))
    if (things := ready_made(method)) is not None:
        adapted = things.attach(model, method, config, TASK_TYPES[config.task.kind])
    else:
        adapted = get_peft_model(model, mixture_config(config, method, allocation=plan))
    for own in adapted.peft_config.values():
        if isinstance(own, LoraMoeConfig):
            own.task_names = config.task.part_names or None
    return adapted


def plain_lora_config(plan: Allocation, config: RunConfig, task: Task) -> LoraConfig:
    """PEFT's LoRA with the ranks of a one-expert plan, scaled as the plan scales."""
    adapted = plan.adapted()
    patterns = {name: f"^{re.escape(name)}$" for name in adapted}
    return LoraConfig(
        task_type=TASK_TYPES[task.kind],
        target_modules=list(adapted),
        modules_to_save=config.mixture.modules_to_save,
        lora_dropout=config.mixture.dropout,
        r=min(module.rank for module in adapted.values()),
        rank_pattern={patterns[name]: module.rank for name, module in adapted.items()},
        # PEFT scales by alpha / r, so alpha is chosen to give the plan's scale.
        alpha_pattern={patterns[n]: plan.scales(n)[0] * module.rank for n, module in adapted.items()},
    )
