"""Multiple choice by likelihood: which option does a language model find most likely after the prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..tasks import Example, Task
from ..tasks.loss import IGNORED
from ..tasks.templates import resolve_template
from ..tasks.tokenize import TokenRow, answer_ids, fit_prompt, prompt_ids
from ..tuner import TASKS
from .forward import Progress, row_results


@dataclass(frozen=True)
class OptionScores:
    """Log-likelihoods (nats) of the options of each example, `log_likelihoods[row][option]`, and the choices made.

    Attributes:
        log_likelihoods: sum over the option's tokens; the end-of-sequence token is not part of an option.
        by_sum: index of the likeliest option of each example.
        by_character: the same after dividing by the number of characters of the option, which does not favour short
            options.
    """

    log_likelihoods: list[list[float]]
    by_sum: list[int]
    by_character: list[int]


def score_options(
    model: nn.Module, task: Task, examples: Sequence[Example], batch_size: int, progress: Progress | None = None
) -> OptionScores:
    """Scores every option of every example; all options of an example follow the identical prompt.

    The model must be in evaluation mode (see `evaluating`). Of equal scores the first option wins.
    """
    rows: list[TokenRow] = []
    for example in examples:
        rows += option_rows(task, example)
    losses, _, _ = row_results(model, task, rows, batch_size, progress)
    remaining = iter(losses)
    scores = [[-next(remaining) for _ in example.choices or ()] for example in examples]
    by_character = [
        [score / max(1, len(choice)) for score, choice in zip(row, example.choices or (), strict=True)]
        for row, example in zip(scores, examples, strict=True)
    ]
    return OptionScores(scores, [_best(row) for row in scores], [_best(row) for row in by_character])


def option_rows(task: Task, example: Example) -> list[TokenRow]:
    """One token row per option, with the loss on the option only."""
    options = [answer_ids(task.tokenizer, f" {choice}", eos=False) for choice in example.choices or ()]
    prompt = prompt_ids(task.tokenizer, example, resolve_template(task.config.template))
    # The prompt is cut for the longest option, so that the options differ in nothing but themselves.
    prompt = fit_prompt(task.tokenizer, prompt, max(map(len, options)), task.config.max_length, example.id)
    of_task = {} if task.task_id(example) is None else {TASKS: task.task_id(example)}
    return [
        {
            "input_ids": prompt + option,
            "attention_mask": [1] * (len(prompt) + len(option)),
            "labels": [IGNORED] * len(prompt) + option,
            **of_task,
        }
        for option in options
    ]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda index: scores[index])
