"""The order of rows: every row once per epoch, and a function of the step alone."""

from __future__ import annotations

import pytest

from guilomo.search.data import RowOrder


@pytest.mark.parametrize(("rows", "batch"), [(12, 4), (10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_row_once_per_epoch(rows: int, batch: int) -> None:
    order = RowOrder(rows, batch, seed=3)
    steps = [order(t) for t in range(5 * rows)]
    assert all(len(step) == batch for step in steps)
    flat = [row for step in steps for row in step]
    epochs = [flat[i : i + rows] for i in range(0, len(flat) - rows + 1, rows)]
    assert len(epochs) >= 5
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)


def test_epochs_and_seeds_differ() -> None:
    order = RowOrder(50, 50, seed=0)
    assert order(0) != order(1)
    assert order(0) != RowOrder(50, 50, seed=1)(0)
    assert order(1) != RowOrder(50, 50, seed=1)(0)


def test_a_batch_depends_on_its_step_alone() -> None:
    wanted = [RowOrder(10, 4, seed=1)(t) for t in range(20)]  # each from a fresh object
    order = RowOrder(10, 4, seed=1)
    assert [order(t) for t in reversed(range(20))] == wanted[::-1]
    assert [order(t) for t in range(20)] == wanted
    assert order(7) == order(7) == wanted[7]
