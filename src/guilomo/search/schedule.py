"""What a step of the search is: functions of the step and the config alone, so that resuming is exact."""

from __future__ import annotations

from guilomo.search.config import SearchConfig


def learning_rate_at(step: int, config: SearchConfig) -> float:
    """Linear rise over the warm-up, then linear fall to a tenth."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    left = (config.steps - step) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * (0.1 + 0.9 * left)


def temperature_at(step: int, config: SearchConfig) -> float:
    """From the first temperature to the final one, geometrically."""
    share = step / max(config.steps - 1, 1)
    return float(config.temperature * (config.final_temperature / config.temperature) ** share)


def is_outer(step: int, config: SearchConfig) -> bool:
    """Whether a step moves the selection vectors too."""
    since = step - config.warmup_steps
    return since >= 0 and since % config.outer_every == 0


def outer_steps_before(step: int, config: SearchConfig) -> int:
    """Number of outer steps among the first `step` steps."""
    return max(0, -(-(step - config.warmup_steps) // config.outer_every))
