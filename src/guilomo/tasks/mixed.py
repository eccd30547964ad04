"""Several tasks as one, whose rows know which of them they belong to (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .config import TaskConfig
from .digest import digest
from .load import task_name
from .schema import Example
from .task import SPLITS, Task
from .tokenize import TokenRow


def mixed(config: TaskConfig, tasks: Sequence[Task]) -> Task:
    """One task of all rows, each with the place of its own task as `router_task_ids`.

    Every split has the rows of the first task, then those of the second, and so on; ids get the task's name in front.
    Classes are those of all tasks, with the task's name in front unless all tasks have the same.

    Args:
        config: with the names of the parts. tasks: one for each, made by one tokenizer.
    """
    labels, firsts = _joint_labels(config.part_names, tasks)
    rows: dict[str, list[TokenRow]] = {split: [] for split in SPLITS}
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for place, (name, task, first) in enumerate(zip(config.part_names, tasks, firsts, strict=True)):
        for split in SPLITS:
            rows[split] += [_row_of_part(row, name, place, first) for row in task.rows(split)]
            examples[split] += [_example_of_part(example, name, labels, first) for example in task.examples[split]]
    return replace(
        tasks[0],
        name=task_name(config),
        labels=labels,
        train=rows["train"],
        held_out=rows["held_out"],
        test=rows["test"],
        examples=examples,
        truncated={split: sum(task.truncated[split] for task in tasks) for split in SPLITS},
        data_hash=digest([[name, task.data_hash] for name, task in zip(config.part_names, tasks, strict=True)]),
        config=config,
        parts=tuple(config.part_names),
    )


def _joint_labels(names: Sequence[str], tasks: Sequence[Task]) -> tuple[list[str] | None, list[int]]:
    """All classes, and the place of the first class of each task among them."""
    own = [task.labels or [] for task in tasks]
    if all(labels == own[0] for labels in own):
        return tasks[0].labels, [0] * len(tasks)
    joint = [f"{name}: {label}" for name, labels in zip(names, own, strict=True) for label in labels]
    return joint, [sum(map(len, own[:place])) for place in range(len(tasks))]


def _row_of_part(row: TokenRow, name: str, place: int, first: int) -> TokenRow:
    labels = row["labels"] + first if isinstance(row["labels"], int) else row["labels"]
    return {**row, "labels": labels, "example": f"{name}/{row['example']}", "router_task_ids": place}


def _example_of_part(example: Example, name: str, labels: list[str] | None, first: int) -> Example:
    example = replace(example, id=f"{name}/{example.id}", task=name)
    if labels is None or example.label is None:
        return example
    label = example.label + first
    return replace(example, choices=tuple(labels), label=label, answer=labels[label])
