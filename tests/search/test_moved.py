"""How far a search moved: nothing where the vectors stayed, and what the expected counts say where they did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from search_tools import mixture_search, small_config

from guilomo.search.moved import Moved, start_of


@pytest.mark.parametrize("variant", [{}, {"relaxation": "prefix"}, {"min_experts": 0}, {"final_temperature": 0.2}])
def test_untouched_vectors_have_not_moved(variant: dict[str, Any]) -> None:
    """Hardening alone is no movement."""
    job = mixture_search(small_config(steps=6, warmup_steps=5, **variant))
    result = job.run(should_stop=lambda: job.step == 5)
    assert result.moved == Moved(0.0, 0.0, 0.0, 0.0, 0.0)
    start = start_of(job.vectors, job.budget).parameters()
    assert all(torch.equal(a, b) for a, b in zip(start, job.problem.selection, strict=True))


def test_a_tiny_step_barely_moves_and_is_warned_of() -> None:
    result = mixture_search(small_config(outer_learning_rate=1e-6)).run()
    assert 0 < result.moved.ranks_mean < 1e-3
    warning = result.to_dict()["moved"]["warning"]
    assert "barely moved" in warning
    assert "search.steps, now 12" in warning
    assert "search.outer_learning_rate (now 1e-06)" in warning


def test_a_large_step_moves_and_is_not_warned_of() -> None:
    result = mixture_search(small_config(outer_learning_rate=3.0)).run()
    assert result.moved.ranks_max >= result.moved.ranks_mean > 0.25
    assert 0 < result.moved.modules <= 1
    assert result.to_dict()["moved"]["warning"] is None


@pytest.mark.parametrize(("experts", "ranks"), [(0.3, 0.0), (0.0, 0.3), (0.25, 0.25)])
def test_one_kind_of_movement_is_enough(experts: float, ranks: float) -> None:
    assert Moved(experts, experts, ranks, ranks, 0.5).warning(small_config()) is None


def test_the_start_is_the_same_after_any_number_of_steps() -> None:
    job = mixture_search(small_config(outer_learning_rate=3.0))
    before = [g.detach().clone() for g in job.problem.selection]
    job.run()
    after = list(start_of(job.vectors, job.budget).parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
