"""A few labelled examples of a task, and how well a model does on them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from guilomo.errors import GuilomoError, invalid
from guilomo.evaluation import evaluate
from guilomo.evaluation.forward import evaluating, row_results
from guilomo.tasks import Task
from guilomo.tasks.split import strata_of, take


@dataclass(frozen=True)
class ShotScore:
    """How well a model does on K labelled examples.

    Attributes:
        accuracy: share of the examples it gets right; None where the task has no right answers.
        perplexity: ``exp`` of the mean over examples of the loss per token of the answer.
    """

    accuracy: float | None
    perplexity: float


def draw_shots(task: Task, k: int, seed: int) -> Task:
    """The task with only `k` of its training rows, the same for the same seed; classes keep their shares.

    Held-out and test rows are never used for a choice.

    Raises:
        GuilomoError: k is below 1 or above the number of training rows.
    """
    if not isinstance(k, int) or not 1 <= k <= len(task.train):
        raise invalid("k", k, f"a whole number from 1 to {len(task.train)}, the training rows of {task.name!r}")
    examples = task.examples["train"]
    strata: Sequence[Hashable] = strata_of(examples, task.kind) if examples else [None] * len(task.train)
    rows, _ = take(range(len(task.train)), k, seed, strata)
    shots = {**task.examples, "train": [examples[row] for row in rows]} if examples else task.examples
    return replace(task, train=[task.train[row] for row in rows], examples=shots)


def score_shots(model: nn.Module, shots: Task, accuracy: bool, batch_size: int) -> ShotScore:
    """Scores a model on the training rows of `draw_shots`.

    Accuracy is that of `guilomo.evaluation`: the class; the likeliest option; or, where rows have neither, a greedily
    generated answer that is right. The perplexity weighs examples alike, whatever the length of their answers, as
    Rocket's code does (arXiv 2408.15915, of which the formula lacks the length). It is that of the answers as they are:
    the paper has a language model write out the reasoning first, which is to be done in the data.

    Args:
        model: the model. shots: the rows. accuracy: whether it is wanted. batch_size: changes rounding only.

    Raises:
        GuilomoError: accuracy is wanted and the task has no right answers (plain text).
    """
    if accuracy and shots.kind == "lm":
        raise GuilomoError(
            "Plain text (kind: lm) has no right answers, so adapters cannot be chosen by accuracy. Use by='perplexity'."
        )
    if not accuracy:
        with evaluating(model):
            losses, counts, _ = row_results(model, shots, shots.train, batch_size)
        return ShotScore(None, _perplexity(losses, counts))
    has_options = all(example.choices for example in shots.examples["train"])
    generate = shots.kind == "causal_lm" and not has_options
    found = evaluate(model, shots, "train", batch_size, generate)
    right = found.metrics["exact_match" if generate else "accuracy"].value
    return ShotScore(right, _perplexity(found.row_loss, found.row_tokens))


def _perplexity(losses: Sequence[float], counts: Sequence[int]) -> float:
    per_row = [loss / count for loss, count in zip(losses, counts, strict=True)]
    try:
        return math.exp(math.fsum(per_row) / len(per_row))
    except OverflowError:
        return math.inf
