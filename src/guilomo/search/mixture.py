"""The over-provisioned mixture that a search starts from, and what it can be cut down to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from guilomo.allocation import Allocation, ModuleShape
from guilomo.errors import GuilomoError
from guilomo.layers.routers import ROUTERS, RouterPrice, cost_of_router, router_class
from guilomo.search.config import SearchConfig
from guilomo.tuner import LoraMoeConfig


def search_sized(config: SearchConfig, **options: Any) -> LoraMoeConfig:
    """The over-provisioned mixture a search starts from; `options` are those of `LoraMoeConfig`."""
    sizes = {"num_experts": config.max_experts, "r": config.max_rank, "top_k": config.top_k}
    return LoraMoeConfig(**{**options, **sizes})


@dataclass(frozen=True)
class SearchMixture:
    """The mixture a model carries at the start of a search.

    Attributes:
        plan: its allocation, all experts at full rank.
        shapes: ``(I, O)`` of the modules it adapts; modules without experts take no part.
        options: the PEFT config it was made from. search: the options of the search.
    """

    plan: Allocation
    shapes: dict[str, ModuleShape]
    options: LoraMoeConfig
    search: SearchConfig

    @classmethod
    def of(cls, model: nn.Module, search: SearchConfig) -> SearchMixture:
        """Reads it off a model.

        Raises:
            GuilomoError: the model carries no mixture of the size the search wants.
        """
        config = next(iter(getattr(model, "peft_config", {}).values()), None)
        if isinstance(config, LoraMoeConfig):
            refuse_unsearchable(config.router)
        plan = config.plan if isinstance(config, LoraMoeConfig) else None
        if plan is not None:
            _refuse_structures(plan)
        if not isinstance(config, LoraMoeConfig) or plan is None or not _is_sized(plan, config.router, search):
            raise GuilomoError(
                f"The model does not carry a mixture of {search.max_experts} experts of rank {search.max_rank} with "
                f"top_k = {search.top_k} everywhere. Attach one with get_peft_model(model, search_sized(config, ...))."
            )
        return cls(plan, {name: module.shape for name, module in plan.adapted().items()}, config, search)

    @property
    def router_parameters(self) -> RouterPrice:
        """Trainable parameters of a module's router; a single expert has none."""
        return cost_of_router(self.options.router, self.options.router_options)

    def check_budget(self, budget: int) -> None:
        """Refuses a budget that no outcome of the search can meet.

        Raises:
            GuilomoError: naming the smallest and largest budget that can be met.
        """
        least, most = self._least_parameters(), self.plan.parameters(self.router_parameters)
        if not least <= budget <= most:
            raise GuilomoError(
                f"budget = {budget} is not usable: expected {least} to {most} trainable parameters, from the "
                f"fewest experts at rank 1 to what max_experts = {self.search.max_experts} and max_rank = "
                f"{self.search.max_rank} can spend. Change the budget, raise those two, or adapt fewer modules."
            )

    def _least_parameters(self) -> int:
        experts = self.search.top_k if self.search.top_k_floor else 1
        costs = [experts * sum(s) + self.router_parameters(experts, s.in_features) for s in self.shapes.values()]
        return min(costs) if self.search.min_experts == 0 else sum(costs)


def _refuse_structures(plan: Allocation) -> None:
    """A search weighs experts and rank rows one by one, each at its own price; other structures tie them together."""
    tied = next((name for name, module in plan.adapted().items() if module.structured), None)
    if tied is not None:
        raise GuilomoError(
            f"Module {tied!r} is no plain mixture (shared_a, sequential_rank or a feed-forward block), so its expert "
            "count and ranks cannot be searched. Search a plain mixture; guilomo.allocation.with_shared_a turns a plan "
            "into one with a shared A."
        )


def refuse_unsearchable(router: str) -> None:
    """Refuses a router whose experts cannot be switched off by an offset of their scores.

    Raises:
        GuilomoError: naming the routers that a search can use.
    """
    if not router_class(router).searchable:
        able = ", ".join(name for name, kind in ROUTERS.items() if kind.searchable)
        raise GuilomoError(
            f"router = {router!r} is not usable in a search, which switches experts off by their scores and needs a "
            f"router that then shares the weight among the others: {able}. Search with one of them, and train a "
            f"mixture of the allocation that was found with router={router!r}."
        )


def _is_sized(plan: Allocation, router: str, search: SearchConfig) -> bool:
    ranks = (search.max_rank,) * search.max_experts
    top_k = search.max_experts if router_class(router).dense else search.top_k
    return all(m.ranks == ranks and m.top_k == top_k for m in plan.adapted().values())
