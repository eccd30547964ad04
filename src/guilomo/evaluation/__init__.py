"""Evaluation: scoring models on tasks, and statistics that say how sure a score or a difference is."""

from .agreement import RoutingAgreement, routing_agreement
from .chance import chance_of
from .lm_eval import run_lm_eval
from .scoring import Evaluation, evaluate
from .statistics import (
    Difference,
    McNemar,
    Score,
    bootstrap,
    bootstrap_counts,
    holm,
    mcnemar,
    paired_difference,
    paired_runs,
    t_interval,
    wilson,
)

__all__ = [
    "Difference",
    "Evaluation",
    "McNemar",
    "RoutingAgreement",
    "Score",
    "bootstrap",
    "bootstrap_counts",
    "chance_of",
    "evaluate",
    "holm",
    "mcnemar",
    "paired_difference",
    "paired_runs",
    "routing_agreement",
    "run_lm_eval",
    "t_interval",
    "wilson",
]
