"""The methods of a comparison: the plan of each at the common budget, and its attachment to a model."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from guilomo.allocation import Allocation, ModuleShape, RouterCost
from guilomo.allocation.registry import STRATEGIES, make
from guilomo.allocation.uniform import uniform
from guilomo.errors import GuilomoError, unknown
from guilomo.layers.routers import cost_of_router
from guilomo.run.config import PLAIN_LORA, RANDOM, SEARCHED, SHUFFLED, MethodConfig, RunConfig
from guilomo.search import search_sized
from guilomo.tasks import Task
from guilomo.tuner import LoraMoeConfig, plan_for_router, target_shapes

FROM_SEARCH = (SEARCHED, SHUFFLED)
"""The strategies whose plan is known only after the search."""
TASK_TYPES = {"classification": TaskType.SEQ_CLS, "causal_lm": TaskType.CAUSAL_LM, "lm": TaskType.CAUSAL_LM}


def check_methods(config: RunConfig) -> None:
    """Refuses unknown strategies before anything is loaded."""
    known = {*FROM_SEARCH, *STRATEGIES} - {"learned"}
    for method in config.methods:
        if method.strategy not in known:
            raise unknown(f"strategy of method {method.name!r}", method.strategy, known)
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
        _refuse_common_options(method)


def _refuse_common_options(method: MethodConfig) -> None:
    """What all methods share cannot be an option of one: the comparison would no longer be at one budget."""
    common = sorted({"budget", "router", "weights"} & method.options.keys())
    if common:
        raise GuilomoError(
            f"Method {method.name!r} has the option {common[0]!r}, which is common to all methods. "
            "Set budget.parameters or mixture.router instead."
        )


def mixture_config(config: RunConfig, task: Task, **options: Any) -> LoraMoeConfig:
    """The PEFT config of a mixture in this run."""
    settings = {**config.mixture.peft_options(), "task_type": TASK_TYPES[task.kind], **options}
    return LoraMoeConfig(**settings)


def search_mixture(config: RunConfig, task: Task) -> LoraMoeConfig:
    """The PEFT config of the over-provisioned mixture that the search starts from."""
    return search_sized(config.search, **config.mixture.peft_options(), task_type=TASK_TYPES[task.kind])


def model_shapes(model: nn.Module, config: RunConfig, task: Task) -> dict[str, ModuleShape]:
    """The modules of the model that the run adapts."""
    return target_shapes(model, search_mixture(config, task))


def router_cost(config: RunConfig) -> RouterCost:
    """What the run's router costs."""
    return cost_of_router(config.mixture.router, config.mixture.router_options)


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
    terms: dict[str, Any] = {"budget": budget, "alpha": config.mixture.alpha, "scaling": config.mixture.scaling}
    if method.strategy != PLAIN_LORA:
        terms |= {"router": router_cost(config), "top_k": config.mixture.top_k}
    if method.strategy == "uniform" and config.budget.parameters is None:
        # The plan that sets the budget is itself the uniform row, where it has enough experts for top-k.
        terms |= {"experts": max(config.budget.experts, config.mixture.top_k), "rank": config.budget.rank}
    if method.strategy == RANDOM:
        # The control draws from what the search may choose.
        space = config.search
        terms |= {"max_experts": space.max_experts, "max_rank": space.max_rank, "seed": seed}
        terms |= {"min_experts": space.least_experts, "top_k_floor": space.top_k_floor}
    if method.strategy == "alphalora" and "alphas" not in method.options:
        terms["weights"] = {name: model.get_parameter(f"{name}.weight").detach() for name in shapes}
    plan = make(method.strategy, shapes, **{**terms, **method.options})
    return plan if method.strategy == PLAIN_LORA else plan_for_router(plan, config.mixture.router)


def attach(model: nn.Module, plan: Allocation, method: MethodConfig, config: RunConfig, task: Task) -> PeftModel:
    """The model with the method's adapter, ready to train."""
    if method.strategy == PLAIN_LORA:
        return get_peft_model(model, plain_lora_config(plan, config, task))
    return get_peft_model(model, mixture_config(config, task, allocation=plan))


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
