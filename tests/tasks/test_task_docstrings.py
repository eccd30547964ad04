"""The embedded demo task."""

from __future__ import annotations

import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

from guilomo.tasks import TaskConfig, build_task
from guilomo.tasks import docstrings as room
from guilomo.tasks.areas import AREA_NAMES


def test_size_balance_and_lengths() -> None:
    train, test = room.docstring_examples()
    assert len(AREA_NAMES) == 7
    assert min(Counter(row.label for row in train).values()) >= 150
    assert min(Counter(row.label for row in test).values()) >= 50
    for rows, limit in ((train, room.TRAIN_PER_AREA), (test, room.TEST_PER_AREA)):
        assert max(Counter(row.label for row in rows).values()) <= limit
    assert all(room.SHORTEST <= len(row.input) <= room.LONGEST for row in train + test)
    texts = [row.input.lower() for row in train + test]
    assert len(set(texts)) == len(texts)


def test_it_is_made_afresh_quickly_and_always_the_same() -> None:
    first = room.docstring_examples()
    room.docstring_examples.cache_clear()
    start = time.process_time()
    assert room.docstring_examples() == first
    assert time.process_time() - start < 10  # 2 to 3 s on a quiet machine


def test_no_file_is_on_both_sides() -> None:
    by_file = room._rows_by_file(Path(sysconfig.get_paths()["stdlib"]))
    file_of = {text: name for name, rows in by_file.items() for _, _, text in rows}
    train, test = ({file_of[row.input] for row in rows} for rows in room.docstring_examples())
    assert not train & test
    assert len(test) > 20


def test_only_leading_paragraphs_that_fit() -> None:
    assert room._shorten("One  line.\n\nTwo\nlines.") == "One line. Two lines."
    assert room._shorten("short\n\n" + "x" * 700 + "\n\nafter") == "short"


def test_as_tasks_of_two_kinds(minilm: Any, bpe: Any) -> None:
    task = build_task(TaskConfig(), minilm)
    assert task.labels == list(AREA_NAMES)
    assert len(task.train) == 3 * len(task.held_out)
    small = build_task(TaskConfig(kind="causal_lm", max_length=512, train_size=20, test_size=10), bpe)
    assert len(small.train) + len(small.held_out) == 20
    assert small.examples["test"][0].choices == AREA_NAMES
