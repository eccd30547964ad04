"""Scoring a model on one split of a task: one call, one `Evaluation` with per-row results and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import invalid
from ..tasks import Example, Task
from ..tasks.templates import completion
from ..tuner import TASKS
from . import metrics
from .answers import is_right
from .forward import Progress, evaluating, row_results
from .generation import generate_answers
from .options import score_options
from .statistics import Score


@dataclass(frozen=True)
class Evaluation:
    """What a model scored, with everything needed to pair it with another model row by row.

    Attributes:
        task, kind, split: what was scored.
        data_hash: of the task; only evaluations with equal hashes may be paired.
        metrics: each with its interval. Always "loss" (nats per prediction); see `evaluate` for the others.
        ids: of the rows, in the order of the split; all lists below follow it.
        row_loss: loss sum of each row, in nats.
        row_tokens: predictions (tokens with a label; 1 for classification) of each row.
        predictions: class or option index of each row, or the generated text; None if nothing was predicted.
        hits: whether each row is right, by the metric that is their share: "accuracy", "accuracy_per_character",
            "exact_match"; empty if nothing was predicted.
        generated: generated texts, if asked for.
        parts: the metrics of each part of a mixed task, those that are made of single rows; see `guilomo.tasks.mixed`.
    """

    task: str
    kind: str
    split: str
    data_hash: str
    metrics: dict[str, Score]
    ids: list[str]
    row_loss: list[float]
    row_tokens: list[int]
    predictions: list[int] | list[str] | None
    hits: dict[str, list[bool]]
    generated: list[str] | None = None
    parts: dict[str, dict[str, Score]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        parts = {part: _plain(scores) for part, scores in self.parts.items()}
        return {**self.__dict__, "metrics": _plain(self.metrics), "parts": parts}


def _plain(scores: Mapping[str, Score]) -> dict[str, Any]:
    return {name: score.to_dict() for name, score in scores.items()}


def evaluate(
    model: nn.Module,
    task: Task,
    split: str = "test",
    batch_size: int = 32,
    generate: bool = False,
    progress: Progress | None = None,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """Scores `model` on a split, in evaluation mode and without gradients; training flags are restored.

    Metrics by kind of task:
        classification: loss, accuracy, f1 (binary for two classes, else macro), matthews.
        causal_lm: loss and perplexity of the answers. If the rows have choices also accuracy (likeliest option) and
            accuracy_per_character (likelihood divided by the option's characters), and for shared class names f1 and
            matthews. With `generate` also exact_match (see `answers`).
        lm: loss and perplexity per token.

    Args:
        model: anything whose call returns an object with `logits`; for `generate` also with `generate`.
        task: the task.
        split: "train", "held_out" or "test".
        batch_size: rows per batch; it does not change the scores beyond rounding.
        generate: also generate answers greedily (causal_lm only).
        progress: called with (rows done, rows in all) after each batch, anew for each pass.
        max_new_tokens: longest generated answer, see `generate_answers`.

    Raises:
        GuilomoError: no such split, an empty split, or `generate` for another kind than causal_lm.
    """
    rows = task.rows(split)
    if not rows:
        raise invalid("split", split, "a split with rows", "Set held_out_fraction or the sources so that it has some.")
    if generate and task.kind != "causal_lm":
        raise invalid("generate", generate, f"False for a task of kind {task.kind!r}", "Use kind: causal_lm.")
    work = _Pass(model, task, split, batch_size, progress)
    with evaluating(model):
        if task.kind == "classification":
            return _classification(work)
        return _language(work, generate, max_new_tokens)


@dataclass(frozen=True)
class _Pass:
    """What all parts of one evaluation need."""

    model: nn.Module
    task: Task
    split: str
    batch_size: int
    progress: Progress | None

    @property
    def examples(self) -> list[Example]:
        return self.task.examples[self.split]

    def results(self) -> tuple[list[float], list[int], list[int]]:
        """Loss, predictions counted and predicted class of each row."""
        return row_results(self.model, self.task, self.task.rows(self.split), self.batch_size, self.progress)

    def evaluation(
        self,
        scores: dict[str, Score],
        losses: list[float],
        counts: list[int],
        hits: dict[str, list[bool]],
        predictions: list[int] | list[str] | None = None,
        generated: list[str] | None = None,
    ) -> Evaluation:
        """Joins scores and per-row results with what identifies the rows."""
        task = self.task
        ids = [str(row["example"]) for row in task.rows(self.split)]
        named = (task.name, task.kind, self.split, task.data_hash)
        found = Evaluation(*named, scores, ids, losses, counts, predictions, hits, generated)
        return replace(found, parts=_part_scores(self, found))


def _part_scores(work: _Pass, evaluation: Evaluation) -> dict[str, dict[str, Score]]:
    """The scores of every part of a mixed task, by its name, from the results of its rows; none of a single task.

    A part whose rows have options is scored by them also where other parts have none.
    """
    task = work.task
    ids = [row[TASKS] for row in task.rows(evaluation.split)] if task.parts else []
    places = {part: [index for index, own in enumerate(ids) if own == i] for i, part in enumerate(task.parts)}
    scores = {part: _scores_of(evaluation, rows) for part, rows in places.items() if rows}
    for part, found in scores.items():
        examples = [work.examples[row] for row in places[part]] if work.examples else []
        if "accuracy" not in found and _have_options(examples):
            found |= {name: metrics.accuracy(hits) for name, hits in _choices(work, examples)[1].items()}
    return scores


def _scores_of(evaluation: Evaluation, rows: Sequence[int]) -> dict[str, Score]:
    losses, counts = [evaluation.row_loss[i] for i in rows], [evaluation.row_tokens[i] for i in rows]
    found = {"loss": metrics.mean_loss(losses, counts)}
    if evaluation.kind != "classification":
        found["perplexity"] = metrics.perplexity(losses, counts)
    return found | {name: metrics.accuracy([hits[i] for i in rows]) for name, hits in evaluation.hits.items()}


def _classification(work: _Pass) -> Evaluation:
    losses, counts, guesses = work.results()
    labels = [int(row["labels"]) for row in work.task.rows(work.split)]
    hits = {"accuracy": [a == b for a, b in zip(labels, guesses, strict=True)]}
    scores = {"loss": metrics.mean_loss(losses, counts), **_class_metrics(labels, guesses, work.task.num_labels)}
    return work.evaluation(scores, losses, counts, hits, guesses)


def _language(work: _Pass, generate: bool, max_new_tokens: int | None) -> Evaluation:
    losses, counts, _ = work.results()
    scores = {"loss": metrics.mean_loss(losses, counts), "perplexity": metrics.perplexity(losses, counts)}
    hits: dict[str, list[bool]] = {}
    found: dict[str, Any] = {}
    if _have_options(work.examples):
        found = _choose(work, scores, hits)
    if generate:
        # Where there are options they stay the predictions; the texts are kept beside them.
        found = {**_generate(work, max_new_tokens, scores, hits), **found}
    return work.evaluation(scores, losses, counts, hits, **found)


def _class_metrics(labels: Sequence[int], guesses: Sequence[int], classes: int) -> dict[str, Score]:
    return {
        "accuracy": metrics.accuracy([a == b for a, b in zip(labels, guesses, strict=True)]),
        "f1": metrics.f1(labels, guesses, classes, "binary" if classes == 2 else "macro"),
        "matthews": metrics.matthews(labels, guesses, classes),
    }


def _choose(work: _Pass, scores: dict[str, Score], hits: dict[str, list[bool]]) -> dict[str, Any]:
    """Option likelihood; an option is right if its words are, since some sets repeat an option."""
    examples = work.examples
    guesses, found = _choices(work, examples)
    first = examples[0].choices or ()
    if all(example.type == "cls" and example.choices == first for example in examples):
        scores |= _class_metrics([example.label or 0 for example in examples], guesses, len(first))
    hits |= found
    scores |= {name: metrics.accuracy(own) for name, own in found.items()}
    return {"predictions": guesses}


def _have_options(examples: Sequence[Example]) -> bool:
    return bool(examples) and all(example.choices for example in examples)


def _choices(work: _Pass, examples: Sequence[Example]) -> tuple[list[int], dict[str, list[bool]]]:
    """The likeliest option of every row, and the hits by each way of comparing options."""
    found = score_options(work.model, work.task, examples, work.batch_size, work.progress)
    hits = {
        "accuracy": _option_hits(examples, found.by_sum),
        "accuracy_per_character": _option_hits(examples, found.by_character),
    }
    return found.by_sum, hits


def _option_hits(examples: Sequence[Example], guesses: Sequence[int]) -> list[bool]:
    return [
        example.choices is not None and example.choices[guess] == example.answer
        for example, guess in zip(examples, guesses, strict=True)
    ]


def _generate(
    work: _Pass, max_new_tokens: int | None, scores: dict[str, Score], hits: dict[str, list[bool]]
) -> dict[str, Any]:
    """Exact match of greedily generated answers."""
    texts = generate_answers(work.model, work.task, work.examples, work.batch_size, max_new_tokens, work.progress)
    pairs = zip(texts, work.examples, strict=True)
    hits["exact_match"] = [is_right(text, completion(example)) for text, example in pairs]
    scores["exact_match"] = metrics.accuracy(hits["exact_match"])
    return {"predictions": texts, "generated": texts}
