"""Router losses, by the name of their form. Coefficients cannot be carried from one form to another.

All forms are functions of sums over tokens, so the statistics of several modules can be added: adding them is the
same as concatenating the modules' tokens, which is MoLA's per-layer form.

    form              at uniform   definition
    switch            1            E * sum_e f_e P_e,   f_e = count_e / (T K)
    switch_per_slot   K            E * sum_e f_e P_e,   f_e = count_e / T       (Switch / Mixtral in transformers)
    sign              1            E * sum_e f_e W_e,   f as in switch, W_e = mean routing weight (LD-MoLE)
    cv_squared        0            Var(Z) / (mean(Z)^2 + 1e-10), Z_e = sum of routing weights (LoRAMoE)
    localized         not 0        cv_squared of Z_be = I_be * (sum of row b's weights of expert e), see `_localized`
    divergence        0.02         what is missing of H(mean weights) - mean H(weights), see `_divergence` (HMoRA)
    rsl               see there    balance by the first choices, and the tokens' entropy, see `_rsl` (LoRA-Mixer)

P_e is the mean softmax probability over all experts, H the entropy in nats; no gradient flows through counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.errors import GuilomoError, unknown
from guilomo.layers.options import completed, defaults_of, expect_choice, expect_number
from guilomo.layers.routing import MISSING_TASKS, Routing


@dataclass
class RouterStatistics:
    """Sums over the real tokens of one or several modules; ``+`` adds tokens.

    Attributes:
        tokens: ``()`` number of tokens; counts: ``(E,)`` times chosen; probability: ``(E,)`` summed softmax;
        weight: ``(E,)`` summed routing weight; square_lse: ``()`` summed squared logsumexp of the logits;
        entropy: ``()`` summed entropy of the routing weights, in nats; first: ``(E,)`` times of the highest logit;
        penalty: ``()`` summed loss of the router itself; rows: ``(B, E)`` summed routing weight of each row;
        row_tasks: ``(B,)`` int64 task of each row, which has no sum: both sides of ``+`` are of the same batch.

    Sums that were not asked for are 0.
    """

    tokens: Tensor
    counts: Tensor
    probability: Tensor
    weight: Tensor
    square_lse: Tensor
    entropy: Tensor
    first: Tensor
    penalty: Tensor
    rows: Tensor
    row_tasks: Tensor

    def __add__(self, other: RouterStatistics) -> RouterStatistics:
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return RouterStatistics(**{**summed, "row_tasks": self.row_tasks})

    def detach(self) -> RouterStatistics:
        return RouterStatistics(*(getattr(self, f.name).detach() for f in fields(self)))

    def without_rows(self) -> RouterStatistics:
        """Sums that can be added over batches of different sizes."""
        zero = torch.zeros_like(self.tokens)
        return replace(self, rows=zero, row_tasks=zero)


_SUMS = tuple(f.name for f in fields(RouterStatistics) if f.name != "tokens")
EVERYTHING = frozenset({"counts", "probability", "weight", "square_lse", "entropy"})
"""The sums that health reports are made of."""


def router_statistics(
    routing: Routing, real: Tensor | None, wanted: frozenset[str] = EVERYTHING, tasks: Tensor | None = None
) -> RouterStatistics:
    """Sums over tokens of a routing.

    Args:
        routing: of ``(..., E)`` tokens.
        real: ``(...)`` bool or 0/1, which tokens count (not padding, not held out); None for all.
        wanted: the sums to make, beside that of the tokens. A step pays for each of them in every adapted linear.
        tasks: ``(B,)`` int64 of the rows of the batch, for "rows" alone.

    Raises:
        GuilomoError: "rows" are wanted without tasks, or the "penalty" of a router that has none.
    """
    logits = routing.logits
    share = None if real is None else real.reshape(-1).to(logits.dtype)

    def total(values: Tensor) -> Tensor:
        flat = values.reshape(-1, *values.shape[logits.dim() - 1 :])
        return flat.sum(0) if share is None else share @ flat

    tokens = logits.new_full((), logits.shape[:-1].numel()) if share is None else share.sum()
    found = {name: total(_PER_TOKEN[name](routing)) for name in sorted(wanted - {"rows"})}
    if "rows" in wanted:
        found |= _rows(routing, share, tasks)
    zero = torch.zeros_like(tokens)
    return RouterStatistics(tokens, **{name: found.get(name, zero) for name in _SUMS})


def _rows(routing: Routing, share: Tensor | None, tasks: Tensor | None) -> dict[str, Tensor]:
    if tasks is None:
        raise GuilomoError(MISSING_TASKS)
    weights = routing.weights.flatten(0, -2)
    counted = weights if share is None else weights * share[:, None]
    return {"rows": counted.view(len(tasks), -1, weights.shape[-1]).sum(1), "row_tasks": tasks}


def _entropy(weights: Tensor) -> Tensor:
    """Over the last dimension, in nats; its gradient is finite where a weight is 0."""
    entropy: Tensor = -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(-1)
    return entropy


def _penalty(routing: Routing) -> Tensor:
    if routing.penalty is None:  # routers that never have one were refused, so that this one lacks what it is made of
        raise GuilomoError(MISSING_TASKS)
    return routing.penalty


_PER_TOKEN: dict[str, Callable[[Routing], Tensor]] = {
    "counts": lambda routing: routing.chosen.to(routing.logits.dtype),
    "probability": lambda routing: routing.probabilities,
    "weight": lambda routing: routing.weights,
    "square_lse": lambda routing: routing.logits.logsumexp(-1).square(),
    "entropy": lambda routing: _entropy(routing.weights),
    "first": lambda routing: F.one_hot(routing.logits.argmax(-1), routing.logits.shape[-1]).to(routing.logits.dtype),
    "penalty": _penalty,
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


def _localized(s: RouterStatistics, *, delta: float = 0.1, types: int = 2) -> Tensor:
    """LoRAMoE's localised balancing (arXiv 2312.09979), with the normalisation of its released code.

    ``Q_be`` is the routing weight that row b gave expert e, ``I_be = 1 + delta`` where the expert's group is that of
    the row's task and ``1 - delta`` elsewhere; the loss is ``Var(Z) / (mean(Z)^2 + 1e-10)`` over all of ``Z = I * Q``.
    Experts are divided into as many contiguous groups as there are types; the first group belongs to the highest type,
    which for two types is the code's assignment. The paper's own delta is known to us from memory only.
    """
    expect_number("balance_options['delta']", delta, at_least=0, at_most=1)
    expect_number("balance_options['types']", types, at_least=2, whole=True)
    experts = s.rows.shape[-1]
    group = types - 1 - torch.arange(experts, device=s.rows.device) * types // experts
    own = s.row_tasks[:, None] == group
    z = s.rows * torch.where(own, 1 + delta, 1 - delta).to(s.rows.dtype)
    # Rows without a token that counts (held-out ones, in a search) have no part.
    present = (s.rows.detach() != 0).any(-1, keepdim=True).to(z.dtype)
    entries = (present.sum() * experts).clamp_min(1)
    mean = z.sum() / entries
    return ((z - mean) * present).square().sum() / entries / (mean.square() + 1e-10)


def _divergence(s: RouterStatistics, *, balanced: float = 0.98, certain: float = 0.5) -> Tensor:
    """HMoRA's divergence loss (ICLR 2025): even on average, decided for each token.

    ``relu(D_max - (min(H(mean w), balanced log E) - max(mean H(w), certain log E))) / log E``, with ``D_max`` the
    difference of the two bounds: balance is asked for up to the first, certainty down to the second. We read the
    released clamps so, and take the weights that multiply the experts for w.
    """
    expect_number("balance_options['balanced']", balanced, above=0, at_most=1)
    expect_number("balance_options['certain']", certain, at_least=0, at_most=balanced)
    tokens = s.tokens.clamp_min(1)
    log_e = math.log(max(s.weight.numel(), 2))
    spread = _entropy(s.weight / tokens).clamp_max(balanced * log_e)
    doubt = (s.entropy / tokens).clamp_min(certain * log_e)
    missing = ((balanced - certain) * log_e - (spread - doubt)).relu() / log_e
    return missing * (s.tokens > 0)


def _rsl(
    s: RouterStatistics, *, entropy_sign: int = 1, entropy_weight: float = 1.0, load_weight: float = 1.0
) -> Tensor:
    """LoRA-Mixer's routing specialisation loss (arXiv 2507.00029): ``a sum_e p_e f_e + sign * b * mean_t H(w_t)``.

    p is the mean routing weight and f the share of tokens whose first choice an expert is, without gradient. With
    sign 1 minimising makes every token decide, as the paper's text has it; -1 is what its equation prints, which does
    the opposite. The two weights are not known to us. The text's other f, a normalised top-k score, is not offered.
    """
    expect_choice("balance_options['entropy_sign']", entropy_sign, (1, -1))
    expect_number("balance_options['entropy_weight']", entropy_weight, at_least=0)
    expect_number("balance_options['load_weight']", load_weight, at_least=0)
    tokens = s.tokens.clamp_min(1)
    load = (s.weight / tokens * s.first / tokens).sum()
    return load_weight * load + entropy_sign * entropy_weight * s.entropy / tokens


BALANCE_FORMS: dict[str, Callable[..., Tensor]] = {
    "switch": _switch,
    "switch_per_slot": _switch_per_slot,
    "sign": _sign,
    "cv_squared": _cv_squared,
    "localized": _localized,
    "divergence": _divergence,
    "rsl": _rsl,
}
_READ_BY = {
    "switch": ("counts", "probability"),
    "switch_per_slot": ("counts", "probability"),
    "sign": ("counts", "weight"),
    "cv_squared": ("weight",),
    "localized": ("rows",),
    "divergence": ("weight", "entropy"),
    "rsl": ("weight", "entropy", "first"),
}


def balance_loss(form: str, statistics: RouterStatistics, **options: Any) -> Tensor:
    """The named balance loss ``()``; 0 without tokens.

    Raises:
        GuilomoError: no such form or option; the nearest one is proposed.
    """
    if form not in BALANCE_FORMS:
        raise unknown("balance_loss", form, BALANCE_FORMS)
    return BALANCE_FORMS[form](statistics, **options)


def balance_options(form: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """All options of the named form, those not given at their defaults.

    Raises:
        GuilomoError: an option that the form does not have, or a value that cannot work.
    """
    known = {} if form is None else defaults_of(BALANCE_FORMS[form])
    found = completed("balance_options", f"balance_loss={form!r}", options, known)
    if form is not None:
        one, two = torch.ones(()), torch.ones(2)
        empty = RouterStatistics(one, two, two, two, one, one, two, one, torch.ones(1, 2), torch.zeros(1))
        balance_loss(form, empty, **found)
    return found


def read_by(form: str | None, z_loss: bool, penalty: bool = False) -> frozenset[str]:
    """The sums that the named balance loss and, if asked for, the z-loss and the router's own loss are made of."""
    others = (("square_lse", z_loss), ("penalty", penalty))
    return frozenset((*_READ_BY.get(form or "", ()), *(name for name, asked in others if asked)))


def z_loss(statistics: RouterStatistics) -> Tensor:
    """Mean squared logsumexp of the logits ``()`` (ST-MoE, arXiv 2202.08906): keeps logits small."""
    return statistics.square_lse / statistics.tokens.clamp_min(1)


def own_loss(statistics: RouterStatistics) -> Tensor:
    """Mean of the router's own loss over tokens ``()``, see `Routing.penalty`."""
    return statistics.penalty / statistics.tokens.clamp_min(1)
