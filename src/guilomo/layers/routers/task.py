"""MOELoRA: one mixture per task, from an embedding of the task's id (arXiv 2310.18339)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guilomo.errors import GuilomoError, invalid
from guilomo.layers.options import expect_number, option
from guilomo.layers.routing import (
    NOWHERE,
    Place,
    Router,
    Routing,
    Tokens,
    accumulation_dtype,
    softmax_over_experts,
    without_autocast,
)


class TaskRouter(Router):
    """``p = softmax(W emb(task))`` for every token of a row: the mixture of a task is one matrix, and can be merged.

    Published with experts of rank r/E and scale alpha/r for the total r; ours is alpha over an expert's own rank.

    Options:
        tasks: their number; ids are 0 to tasks - 1.
        width: of the embedding. The published one is not known to us.
    """

    static_by_task = True
    dense = True
    reads = frozenset({"task"})

    def __init__(
        self,
        in_features: int,
        experts: int,
        top_k: int,
        place: Place = NOWHERE,
        *,
        tasks: int | None = None,
        width: int = 16,
    ) -> None:
        super().__init__()
        assert tasks is not None, "checked with the options"
        self.experts = experts
        self.embedding = nn.Parameter(torch.randn(tasks, width))
        self.weight = nn.Parameter(torch.empty(experts, width))
        nn.init.kaiming_uniform_(self.weight)

    @classmethod
    def check_options(cls, **options: Any) -> None:
        check_task_count(options["tasks"])
        expect_number(option("width"), options["width"], at_least=1, whole=True)

    @classmethod
    def parameters_for(cls, experts: int, in_features: int, **options: Any) -> int:
        found: int = options["width"] * (options["tasks"] + experts)
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Zeros: the scores depend on the task alone, which `route` is told."""
        return x.new_zeros((*x.shape[:-1], self.experts), dtype=accumulation_dtype(x.dtype))

    def route(self, logits: Tensor, tokens: Tokens) -> Routing:
        tasks = known_tasks(tokens.tasks(len(self.embedding)), len(self.embedding))
        scores = self._scores().to(logits.dtype)[tasks]
        return Routing(softmax_over_experts(scores), scores)

    def gates_of(self, task: int) -> Tensor:
        """``(E,)`` weights of one task.

        Raises:
            GuilomoError: there is no such task.
        """
        if not 0 <= task < len(self.embedding):
            raise invalid("task", task, f"one of the {len(self.embedding)} tasks, from 0")
        return softmax_over_experts(self._scores()[task]).detach()

    def _scores(self) -> Tensor:
        """``(tasks, E)``, of all tasks: there are few."""
        dtype = accumulation_dtype(self.weight.dtype)
        with without_autocast(self.weight.device.type):
            return F.linear(self.embedding.to(dtype), self.weight.to(dtype))


def check_task_count(tasks: Any) -> None:
    """GuilomoError unless the option `tasks` says how many tasks there are."""
    if tasks is None:
        raise invalid(option("tasks"), None, "the number of tasks", "Set it, for example router_options={'tasks': 3}.")
    expect_number(option("tasks"), tasks, at_least=1, whole=True)


def known_tasks(tasks: Tensor, count: int) -> Tensor:
    """The same ids; GuilomoError if one is not below `count`. Accelerators are not waited for, and not checked here."""
    if tasks.device.type == "cpu" and tasks.numel() and not torch.compiler.is_compiling():
        low, high = int(tasks.min()), int(tasks.max())
        if low < 0 or high >= count:
            raise GuilomoError(
                f"router_task_ids holds {low if low < 0 else high}: expected 0 to {count - 1}. Number the tasks from 0."
            )
    return tasks
