"""The selection vectors of all modules, and everything that follows from them without a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from guilomo.allocation import ModuleShape
from guilomo.allocation.costs import RouterCost, linear_router
from guilomo.allocation.preference import Preference
from guilomo.search import relaxation as relax
from guilomo.search.config import SearchConfig
from guilomo.tuner import SelectionMasks


class SelectionVectors(nn.Module):
    """Preferences over expert counts, one vector per module, and over ranks, one per expert.

    Parameters:
        experts: ``(M, E)``; ranks: ``(M, E, R)``, for M modules, in the order of `names`.
    """

    def __init__(
        self, shapes: Mapping[str, ModuleShape], config: SearchConfig, router: RouterCost = linear_router
    ) -> None:
        super().__init__()
        self.names = list(shapes)
        self.config = config
        self.temperature = config.temperature
        self.least_experts = config.least_experts
        e, r = config.max_experts, config.max_rank
        counts = e + 1 if self.least_experts == 0 else e
        self.experts = nn.Parameter(torch.zeros(len(self.names), counts, dtype=torch.float32))
        self.ranks = nn.Parameter(torch.zeros(len(self.names), e, r, dtype=torch.float32))
        self.row_cost: Tensor
        self.router_cost: Tensor
        rows = torch.tensor([float(i + o) for i, o in shapes.values()], dtype=torch.float64)
        routers = torch.tensor([router(e, i) / e if e > 1 else 0.0 for i, _ in shapes.values()], dtype=torch.float64)
        self.register_buffer("row_cost", rows, persistent=False)
        self.register_buffer("router_cost", routers, persistent=False)

    @property
    def sampled(self) -> bool:
        """Whether masks are draws, see `guilomo.search.draws`."""
        return self.config.relaxation == "survival" and self.config.masks == "sampled"

    @property
    def pairs(self) -> bool:
        """Whether rows that teach are seen under two draws: when expert counts are open behind a router."""
        return self.sampled and max(self.least_experts, 1) < self.config.max_experts

    def survival_masks(self) -> tuple[Tensor, Tensor]:
        """Soft masks over experts ``(M, E)`` and rank components ``(M, E, R)``."""
        experts = relax.survival(self.experts, self.temperature)
        if self.least_experts == 0:
            experts = experts[:, 1:]  # the first count is 0 experts
        elif self.least_experts > 1:
            # The first K experts are always there, so they carry no doubt.
            kept = torch.arange(experts.shape[-1], device=experts.device) < self.least_experts
            experts = torch.where(kept, torch.ones_like(experts), experts)
        return experts, relax.survival(self.ranks, self.temperature)

    def masks(self, detach: bool = False) -> dict[str, SelectionMasks]:
        """What the layers apply, by module name; with `detach`, as constants.

        Under sampled masks, these are not drawn: what is kept with a chance of at least one half is on.
        """
        log_experts, ranks = self._survival_effect() if self.config.relaxation == "survival" else self._prefix_effect()
        if detach:
            log_experts, ranks = log_experts.detach(), ranks.detach()
        one_expert = self.config.max_experts == 1
        return {
            name: SelectionMasks(None if one_expert else log_experts[m], ranks[m].reshape(-1))
            for m, name in enumerate(self.names)
        }

    def _survival_effect(self) -> tuple[Tensor, Tensor]:
        experts, ranks = self.survival_masks()
        log_experts = relax.log_survival(experts)
        exists = experts[:, :1]
        if self.config.masks != "soft":
            ranks, exists = relax.harden(ranks), relax.harden(exists)
            blocked = (experts < 0.5) & (exists >= 0.5)  # a module that is off blocks nothing, see `draws.show`
            offsets = torch.where(blocked, relax.EXPERT_BLOCK, 0.0).to(experts.dtype)
            log_experts = offsets + (log_experts - log_experts.detach())
        if self.least_experts == 0:
            # Routing weights are renormalised, so that a whole module fades only through its rows.
            ranks = ranks * exists.unsqueeze(-1)
        return log_experts, ranks

    def _prefix_effect(self) -> tuple[Tensor, Tensor]:
        return relax.prefix_log_expert(self.experts, self.least_experts), relax.prefix_rank_mask(self.ranks)

    def expected(self) -> tuple[Tensor, Tensor]:
        """Expected expert count ``(M,)`` and expected rank of each expert ``(M, E)``."""
        if self.config.relaxation == "survival":
            experts, ranks = self.survival_masks()
            return relax.expected_count(experts), relax.expected_count(ranks)
        return relax.prefix_count(self.experts, self.least_experts), relax.prefix_count(self.ranks)

    def expected_parameters(self) -> Tensor:
        """Expected trainable parameters ``()``, differentiable under `survival`, routers included."""
        if self.config.relaxation == "survival":
            experts, _ = self.survival_masks()
        else:
            counts, _ = self.expected()
            experts = (torch.arange(self.config.max_experts, device=counts.device) < counts[:, None]).to(counts.dtype)
        _, ranks = self.expected()
        per_expert = self.router_cost[:, None] + self.row_cost[:, None] * ranks.double()
        return (experts.double() * per_expert).sum()

    def budget_penalty(self, budget: int) -> Tensor:
        """``(expected parameters / budget - 1)^2``."""
        return (self.expected_parameters() / budget - 1).square()

    @torch.no_grad()
    def start_at(self, budget: int) -> None:
        """Sets all vectors to one common preference whose expected parameters meet the budget.

        Under `survival` the entries rise or fall linearly with the count, by a slope found by bisection; under
        `prefix` they are a discretised bell around the count that fits best.
        """
        if self.config.relaxation == "prefix":
            self._start_prefix(budget)
            return
        # Steep enough for any width: neighbouring counts differ by up to 16 in the exponent.
        high = 16.0 * self.temperature * max(self.experts.shape[-1], self.ranks.shape[-1])
        low = -high
        for _ in range(60):
            slope = (low + high) / 2
            self._tilt(slope)
            low, high = (low, slope) if float(self.expected_parameters()) > budget else (slope, high)

    def _tilt(self, slope: float) -> None:
        for g in (self.experts, self.ranks):
            g.copy_((slope * torch.linspace(0, 1, g.shape[-1], device=g.device)).expand_as(g))

    def _start_prefix(self, budget: int) -> None:
        e_max, r_max = self.ranks.shape[1:]
        plain = [(e, r) for e in range(self.least_experts, e_max + 1) for r in range(1, r_max + 1)]
        cost = {(e, r): e * float((self.router_cost + r * self.row_cost).sum()) for e, r in plain}
        # Both axes start as far along their range as each other, as near the budget as that allows.
        best = min(plain, key=lambda p: (abs(cost[p] - budget), abs(p[0] / e_max - p[1] / r_max)))
        for g, count in ((self.experts, best[0]), (self.ranks, best[1])):
            n = g.shape[-1]
            place = torch.arange(n, device=g.device, dtype=g.dtype)
            bell = torch.exp(-0.5 * ((place - (count - 1)) / (max(n, 2) / 6)).square())
            g.copy_(bell.softmax(-1).expand_as(g))

    @torch.no_grad()
    def preference(self, budget: int) -> Preference:
        """The wishes that the budget projection turns into integers; 0 experts for modules that go unadapted."""
        experts, ranks = (t.detach().double().cpu() for t in self.expected())
        if self.least_experts == 0:
            experts = self._kept_experts(budget)
        return Preference(
            experts=dict(zip(self.names, experts.tolist(), strict=True)),
            ranks={name: tuple(row) for name, row in zip(self.names, ranks.tolist(), strict=True)},
        )

    def _kept_experts(self, budget: int) -> Tensor:
        """Expected expert counts ``(M,)`` of the modules that stay adapted, given that they do; 0 for the others.

        Modules stay in the order of their chance to exist: all whose chance is at least one half, and more until what
        they would cost reaches the budget (where every chance is small, something must stay all the same). None stays
        that the budget cannot pay at rank 1.
        """
        experts, ranks = (t.double().cpu() for t in self.survival_masks())
        exists = experts[:, 0]
        given = experts / exists.clamp_min(1e-12)[:, None]
        per_expert = self.router_cost.cpu()[:, None] + self.row_cost.cpu()[:, None] * ranks.sum(-1)
        cost, least = (given * per_expert).sum(-1), self.row_cost.cpu()
        kept = torch.zeros_like(exists)
        spent = floor = 0.0
        for m in exists.sort(descending=True, stable=True).indices.tolist():
            wanted = float(exists[m]) >= 0.5 or spent < budget
            if wanted and floor + float(least[m]) <= budget:
                kept[m] = given[m].sum()
                spent, floor = spent + float(cost[m]), floor + float(least[m])
        return kept
