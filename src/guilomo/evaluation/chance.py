"""What would be right without reading the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean

from ..tasks import Example, Task


def chance_of(task: Task) -> float | None:
    """Accuracy on the test rows without reading them; None where there is no accuracy (ours).

    That of always naming the most frequent class, or where every row has choices of its own, of guessing among them. In
    a mixed task which part a row belongs to is taken as known, for it is seen at a glance.
    """
    examples = task.examples["test"]
    if not examples or any(example.choices is None for example in examples):
        return None
    groups = [[example for example in examples if example.task == part] for part in task.parts] or [examples]
    return sum(_right(group) for group in groups) / len(examples)


def _right(examples: Sequence[Example]) -> float:
    """How many of these rows of one task would be right."""
    choices = [tuple(example.choices or ()) for example in examples]
    if len(set(choices)) == 1:
        return max(Counter(example.label for example in examples).values())
    return len(examples) * mean(1 / len(found) for found in choices)
