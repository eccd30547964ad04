"""Router health: how the load is shared, how decided the router is, which experts are dead."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from guilomo.layers.balance import RouterStatistics


@dataclass(frozen=True)
class RouterHealth:
    """The routing of one module over the tokens seen since the last reset.

    Attributes:
        load: share of all choices that went to each expert; sums to 1.
        load_entropy: entropy of `load` over log E; 1 is perfectly even, 0 is collapse onto one expert.
        token_entropy: mean entropy of a token's routing weights over log E; 0 is a fully decided router.
        dead: experts whose load is below `dead_below` of an even share.
    """

    load: tuple[float, ...]
    load_entropy: float
    token_entropy: float
    dead: tuple[int, ...]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def router_health(statistics: RouterStatistics, dead_below: float = 0.05) -> RouterHealth:
    """Health from summed statistics; synchronises with the host, so call it when logging, not in a step.

    Args:
        statistics: sums over tokens of one module.
        dead_below: an expert is dead when its load is under this fraction of ``1/E``.
    """
    counts = statistics.counts.double().cpu()
    experts = counts.numel()
    load = counts / counts.sum().clamp_min(1)
    log_e = math.log(experts) if experts > 1 else 1.0
    load_entropy = -sum(float(p) * math.log(p) for p in load if p > 0) / log_e
    token_entropy = float(statistics.entropy.double() / statistics.tokens.double().clamp_min(1)) / log_e
    dead = tuple(e for e in range(experts) if load[e] < dead_below / experts)
    return RouterHealth(tuple(load.tolist()), load_entropy, token_entropy, dead)
