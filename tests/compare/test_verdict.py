"""The sentences, on made-up results."""

from __future__ import annotations

from typing import Any

import pytest

from guilomo.compare.verdict import verdict


def made(tests: list[tuple[str, str, str, float, float]], **changes: Any) -> dict[str, Any]:
    """Results with tests ``(task, method, metric, difference, corrected p)``."""
    keys = ("task", "method", "metric", "difference", "p_corrected")
    cell = {"status": "done"}
    entry = {"cells": [cell, cell, cell], "sweep": None}
    names = {"lora": "LoRA (PEFT)", "a": "Method A", "b": "Method B"}
    return {
        "reference": "lora",
        "seeds": [0, 1, 2],
        "tasks": [{"name": "x", "above_chance": True}, {"name": "y", "above_chance": None}],
        "methods": [{"name": n, "label": label, "tasks": {"x": entry, "y": entry}} for n, label in names.items()],
        "tests": [dict(zip(keys, test, strict=True)) for test in tests],
        "friedman": None,
        "failures": [],
        **changes,
    }


WON = [("x", "a", "accuracy", 0.1, 0.01), ("y", "a", "accuracy", 0.1, 0.02), ("x", "b", "loss", 0.3, 0.04)]
EVEN = [("x", "a", "accuracy", 0.1, 0.2), ("x", "b", "accuracy", -0.1, 1.0)]


def test_what_is_better_comes_first() -> None:
    said = verdict(made(WON))
    assert said == [
        "Method A has better accuracy than LoRA (PEFT) on x and y (Holm-corrected p < 0.05).",
        "Method B has worse loss per row than LoRA (PEFT) on x (Holm-corrected p < 0.05).",
    ]


def test_methods_that_did_alike_share_a_sentence() -> None:
    said = verdict(
        made([("x", "a", "loss", -0.1, 0.01), ("x", "b", "loss", -0.2, 0.01), ("y", "b", "loss", 0.2, 0.01)])
    )
    assert said == [
        "Method A and Method B have better loss per row than LoRA (PEFT) on x (Holm-corrected p < 0.05).",
        "Method B has worse loss per row than LoRA (PEFT) on y (Holm-corrected p < 0.05).",
    ]


def test_or_that_nothing_is() -> None:
    said = verdict(made(EVEN))
    assert said[0] == "No method is better than LoRA (PEFT) beyond noise on any task."
    assert "not a proof of equality" in said[1]


def test_a_lower_loss_is_better() -> None:
    assert verdict(made([("x", "a", "loss", -0.1, 0.01)]))[0].startswith("Method A has better loss per row")


@pytest.mark.parametrize(
    ("metric", "noun"), [("accuracy_per_character", "accuracy per character"), ("exact_match", "exact match")]
)
def test_it_says_which_accuracy(metric: str, noun: str) -> None:
    said = verdict(made([("x", "a", metric, 0.1, 0.01)]))
    assert said[0] == f"Method A has better {noun} than LoRA (PEFT) on x (Holm-corrected p < 0.05)."


def test_tasks_at_chance_are_left_out() -> None:
    tasks = [{"name": "x", "above_chance": False}, {"name": "y", "above_chance": True}]
    said = verdict(made(WON, tasks=tasks))
    assert said[0] == "Method A has better accuracy than LoRA (PEFT) on y (Holm-corrected p < 0.05)."
    assert "No row is above chance on x; it is left out of this verdict and of the mean ranks." in said
    lost = [{"name": name, "above_chance": False} for name in ("x", "y")]
    assert verdict(made(WON, tasks=lost))[0].startswith("Nothing is better than chance on any task")


@pytest.mark.parametrize(("seeds", "word"), [([0], "one training"), ([0, 1], "2 trainings")])
def test_few_seeds_are_said(seeds: list[int], word: str) -> None:
    assert any(word in sentence and "use 3 seeds" in sentence for sentence in verdict(made(EVEN, seeds=seeds)))


def test_failures_and_gaps_are_said() -> None:
    results = made(EVEN, failures=[{"task": "x", "method": "a", "seed": 0, "error": "no luck"}])
    results["methods"][0]["tasks"] = {"x": {"cells": [{"status": "missing"}], "sweep": {"edge": True}}}
    said = " ".join(verdict(results))
    for part in ("1 cell failed", "--retry-failed", "1 cell is not done yet", "beyond the grid for LoRA (PEFT) on x"):
        assert part in said


@pytest.mark.parametrize(
    ("p", "rank", "said"), [(0.2, 1.0, "do not differ"), (0.01, 1.0, "Method A"), (0.01, 2.4, "none")]
)
def test_friedman_is_read_with_its_critical_difference(p: float, rank: float, said: str) -> None:
    found = {"p": p, "n_blocks": 6, "critical_difference": 1.2, "mean_ranks": {"lora": 2.5, "a": rank, "b": 2.4}}
    assert said in verdict(made(EVEN, friedman=found))[2]
