"""Every router as the tests of the whole layer see it: options that make it do something, at odd sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TASKS = torch.tensor([2, 0, 1])
"""Of the three rows of `tiny_models.inputs_for`."""

CASES: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk_of_softmax": {},
    "dense": {},
    "fixed": {"router_options": {"weights": [0.5, 0.2, 0.3]}},
    "sparsegen": {"router_options": {"hidden": 5, "target": 1}, "router_loss_coefficient": 0.1},
    "threshold": {},
    "top_p": {"router_options": {"mass": 0.5}, "router_loss_coefficient": 0.1},
    "sinkhorn": {"router_options": {"q": 1.0, "xi": 0.5}, "balance_loss": None},
    "task": {"router_options": {"tasks": 3, "width": 5}},
    "meteora": {"router_options": {"temperature": 2.0}, "router_loss_coefficient": 0.1},
    "lora_mixer": {"balance_loss": "rsl", "balance_coefficient": 0.1},
    "hmora": {"router_options": {"tasks": 3, "hidden": 5}, "balance_loss": "divergence", "balance_coefficient": 0.1},
    "loss_free": {"router_options": {"rate": 0.1}},
    "flylora": {"router_options": {"rate": 0.1}, "r": 1, "balance_loss": None},
}
TASKED = frozenset({"task", "meteora", "hmora"})
"""Those that read tasks."""
MERGEABLE = frozenset({"fixed"})


def options_of(router: str, **options: Any) -> dict[str, Any]:
    return {"router": router, **CASES[router], **options}


def with_tasks(router: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "router_task_ids": TASKS} if router in TASKED else inputs
