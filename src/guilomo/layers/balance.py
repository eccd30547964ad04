"""Router losses, by the name of their form. Coefficients cannot be carried from one form to another.

All forms are functions of sums over tokens, so the statistics of several modules can be added: adding them is the
same as concatenating the modules' tokens, which is MoLA's per-layer form.

    form              at uniform   definition
    switch            1            E * sum_e f_e P_e,   f_e = count_e / (T K)
    switch_per_slot   K            E * sum_e f_e P_e,   f_e = count_e / T       (Switch / Mixtral in transformers)
    sign              1            E * sum_e f_e W_e,   f as in switch, W_e = mean routing weight (LD-MoLE)
    cv_squared        0            Var(Z) / (mean(Z)^2 + 1e-10), Z_e = sum of routing weights (LoRAMoE)

P_e is the mean softmax probability over all experts; no gradient flows through counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from guilomo.errors import unknown
from guilomo.layers.routing import Routing


@dataclass
class RouterStatistics:
    """Sums over the real tokens of one or several modules; ``+`` adds tokens.

    Attributes:
        tokens: ``()`` number of tokens; counts: ``(E,)`` times chosen; probability: ``(E,)`` summed softmax;
        weight: ``(E,)`` summed routing weight; square_lse: ``()`` summed squared logsumexp of the logits;
        entropy: ``()`` summed entropy of the routing weights, in nats.

    Sums that were not asked for are 0.
    """

    tokens: Tensor
    counts: Tensor
    probability: Tensor
    weight: Tensor
    square_lse: Tensor
    entropy: Tensor

    def __add__(self, other: RouterStatistics) -> RouterStatistics:
        return RouterStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def detach(self) -> RouterStatistics:
        return RouterStatistics(*(getattr(self, f.name).detach() for f in fields(self)))


EVERYTHING = frozenset({"counts", "probability", "weight", "square_lse", "entropy"})


def router_statistics(routing: Routing, real: Tensor | None, wanted: frozenset[str] = EVERYTHING) -> RouterStatistics:
    """Sums over tokens of a routing.

    Args:
        routing: of ``(..., E)`` tokens.
        real: ``(...)`` bool or 0/1, which tokens count (not padding, not held out); None for all.
        wanted: the sums to make, beside that of the tokens. A step pays for each of them in every adapted linear.
    """
    logits = routing.logits
    share = None if real is None else real.reshape(-1).to(logits.dtype)

    def total(values: Tensor) -> Tensor:
        flat = values.reshape(-1, *values.shape[logits.dim() - 1 :])
        return flat.sum(0) if share is None else share @ flat

    tokens = logits.new_full((), logits.shape[:-1].numel()) if share is None else share.sum()
    found = {name: total(_PER_TOKEN[name](routing)) for name in sorted(wanted)}
    zero = torch.zeros_like(tokens)
    return RouterStatistics(tokens, **{name: found.get(name, zero) for name in EVERYTHING})


def _entropy(routing: Routing) -> Tensor:
    weights = routing.weights.detach()
    entropy: Tensor = -torch.special.xlogy(weights, weights).sum(-1)
    return entropy


_PER_TOKEN: dict[str, Callable[[Routing], Tensor]] = {
    "counts": lambda routing: routing.chosen.to(routing.logits.dtype),
    "probability": lambda routing: routing.probabilities,
    "weight": lambda routing: routing.weights,
    "square_lse": lambda routing: routing.logits.logsumexp(-1).square(),
    "entropy": _entropy,
}


def _switch(s: RouterStatistics) -> Tensor:
    share = s.counts / s.counts.sum().clamp_min(1)
    return s.counts.numel() * (share * s.probability).sum() / s.tokens.clamp_min(1)


def _switch_per_slot(s: RouterStatistics) -> Tensor:
    tokens = s.tokens.clamp_min(1)
    return s.counts.numel() * (s.counts / tokens * s.probability).sum() / tokens


def _sign(s: RouterStatistics) -> Tensor:
    share = s.counts / s.counts.sum().clamp_min(1)
    return s.counts.numel() * (share * s.weight).sum() / s.tokens.clamp_min(1)


def _cv_squared(s: RouterStatistics) -> Tensor:
    return s.weight.var(unbiased=False) / (s.weight.mean().square() + 1e-10)


BALANCE_FORMS = {
    "switch": _switch,
    "switch_per_slot": _switch_per_slot,
    "sign": _sign,
    "cv_squared": _cv_squared,
}
_READ_BY = {
    "switch": ("counts", "probability"),
    "switch_per_slot": ("counts", "probability"),
    "sign": ("counts", "weight"),
    "cv_squared": ("weight",),
}


def balance_loss(form: str, statistics: RouterStatistics) -> Tensor:
    """The named balance loss ``()``; 0 without tokens. An unknown form is an error that proposes the nearest one."""
    if form not in BALANCE_FORMS:
        raise unknown("balance_loss", form, BALANCE_FORMS)
    return BALANCE_FORMS[form](statistics)


def read_by(form: str | None, z_loss: bool) -> frozenset[str]:
    """The sums that the named balance loss and, if asked for, the z-loss are made of."""
    return frozenset((*_READ_BY.get(form or "", ()), *(("square_lse",) if z_loss else ())))


def z_loss(statistics: RouterStatistics) -> Tensor:
    """Mean squared logsumexp of the logits ``()`` (ST-MoE, arXiv 2202.08906): keeps logits small."""
    return statistics.square_lse / statistics.tokens.clamp_min(1)
