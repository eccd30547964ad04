"""What a run's JSON files keep of a training and of its scores."""

from __future__ import annotations

from typing import Any

from guilomo.evaluation import Evaluation
from guilomo.training import TrainResult


def training_record(trained: TrainResult) -> dict[str, Any]:
    """Times, the loss curve, and how the routers shared the load; null where nothing is routed."""
    health = trained.health
    router = {
        "load": {name: [round(v, 4) for v in h.load] for name, h in health.items()},
        "entropy": {name: round(h.load_entropy, 4) for name, h in health.items()},
        "dead": {name: len(h.dead) for name, h in health.items()},
    }
    return {
        "train_seconds": round(trained.seconds, 2),
        "step_seconds": None if trained.step_seconds is None else round(trained.step_seconds, 5),
        "loss_curve": trained.loss_curve,
        "router": router if health else None,
    }


def score_record(evaluation: Evaluation) -> dict[str, Any]:
    """The metrics, and the rows that tests between methods are paired by."""
    scored = evaluation.to_dict()
    return {
        "data_hash": scored["data_hash"],
        "metrics": scored["metrics"],
        "parts": scored["parts"],
        "rows": {key: scored[key] for key in ("ids", "row_loss", "row_tokens", "hits")},
    }
