"""Chance, ranks and Friedman's test of compare.json, on made-up rows."""

from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from guilomo.compare.results import _above_chance, _friedman, _rank, _same_seeds, _tests
from guilomo.evaluation import chance_of
from guilomo.tasks import Example

SCORES = {
    "lora": {"x": [0.5, 0.6], "y": [3.0, 2.9]},
    "a": {"x": [0.7, 0.7], "y": [2.5, 2.6]},
    "b": {"x": [0.6, 0.8], "y": [2.7, 2.8]},
}
TASKS = [{"name": "x", "higher_is_better": True}, {"name": "y", "higher_is_better": False}]


def made(scores: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    def entry(values: list[float]) -> dict[str, Any]:
        cells = [{"status": "done", "value": value} for value in values]
        return {"mean": sum(values) / len(values), "rank": None, "cells": cells}

    return [{"name": n, "tasks": {t: entry(v) for t, v in tasks.items()}} for n, tasks in scores.items()]


def test_ranks_follow_the_metrics_direction() -> None:
    methods = made(SCORES)
    _rank(methods, TASKS, ["x", "y"])
    assert {m["name"]: [m["tasks"][t]["rank"] for t in "xy"] for m in methods} == {
        "lora": [3.0, 3.0],
        "a": [1.5, 1.0],
        "b": [1.5, 2.0],
    }
    assert [m["mean_rank"] for m in methods] == [3.0, 1.25, 1.75]


def test_tasks_that_do_not_count_are_ranked_but_not_averaged() -> None:
    methods = made(SCORES)
    _rank(methods, TASKS, ["y"])
    assert [m["mean_rank"] for m in methods] == [3.0, 1.0, 2.0]
    _rank(methods, TASKS, [])
    assert [m["mean_rank"] for m in methods] == [None] * 3


def test_a_row_that_is_not_done_has_no_rank() -> None:
    methods = made(SCORES)
    methods[1]["tasks"]["x"]["cells"][1]["status"] = "missing"
    _rank(methods, TASKS, ["x", "y"])
    assert methods[1]["tasks"]["x"]["rank"] is None
    assert methods[1]["mean_rank"] is None
    assert methods[2]["tasks"]["x"]["rank"] == 1.0
    assert _friedman(methods, TASKS, ["x", "y"]) is None  # two whole rows are too few


def test_friedman_is_over_tasks_and_seeds() -> None:
    methods = made(SCORES)
    _rank(methods, TASKS, ["x", "y"])
    found = _friedman(methods, TASKS, ["x", "y"])
    assert found is not None
    blocks = [[-0.5, -0.7, -0.6], [-0.6, -0.7, -0.8], [3.0, 2.5, 2.7], [2.9, 2.6, 2.8]]
    wanted = stats.friedmanchisquare(*zip(*blocks, strict=True))
    assert (found["statistic"], found["p"]) == pytest.approx((wanted.statistic, wanted.pvalue))
    assert found["n_blocks"] == 4
    assert found["mean_ranks"] == {"lora": 3.0, "a": 1.25, "b": 1.75}


def hits(label: str, right: int, n: int = 20, metric: str = "accuracy") -> dict[str, Any]:
    return {"label": label, "summary": {metric: {"mean": right / n, "n": n}}}


def test_chance_is_compared_with_the_best_row_and_their_number() -> None:
    rows = [hits("good", 16), hits("bad", 10)]
    above, note = _above_chance(0.5, rows, "accuracy", generated=False)
    p = 2 * stats.binomtest(16, 20, 0.5, alternative="greater").pvalue
    assert above is True
    assert "good, has 16 of 20" in note
    assert f"p = {p:.2g}" in note
    # With ten rows the same best one is not enough: 10 x 0.0059.
    above, _ = _above_chance(0.5, [*rows, *(hits(f"bad {i}", 0) for i in range(8))], "matthews", generated=False)
    assert above is False


def test_chance_is_met_per_character_where_that_is_the_metric() -> None:
    row = hits("a", 18, metric="accuracy_per_character")
    row["summary"]["accuracy"] = {"mean": 0.4, "n": 20}
    above, note = _above_chance(0.5, [row], "accuracy_per_character", generated=False)
    assert above is True
    assert "18 of 20 test rows right on average over its seeds, by likelihood per character" in note
    assert _above_chance(0.5, [row], "accuracy", generated=False)[0] is False


@pytest.mark.parametrize(
    ("chance", "rows", "generated"),
    [(None, [hits("a", 1)], False), (0.5, [hits("a", 1)], True), (0.5, [], False)],
)
def test_without_an_accuracy_chance_is_not_tested(chance: float | None, rows: list[Any], generated: bool) -> None:
    above, note = _above_chance(chance, rows, "accuracy", generated)
    assert above is None
    assert "Not tested" in note


def example(choices: tuple[str, ...] | None, label: int | None, task: str = "t") -> Example:
    return Example("i", task, "test", "mc", "", "", choices, label, "")


@pytest.mark.parametrize(
    ("examples", "parts", "chance"),
    [
        ([example(("a", "b"), 0), example(("a", "b"), 0), example(("a", "b"), 1)], (), 2 / 3),
        ([example(("a", "b"), 0), example(("c", "d", "e", "f"), 0)], (), (1 / 2 + 1 / 4) / 2),
        ([example(None, None)], (), None),
        ([], (), None),
        # Of each part the most frequent class: 2 of 3 and 1 of 1, where 2 of 4 rows have the most frequent of all.
        (
            [example(("a", "b"), label, task) for label, task in ((0, "t"), (0, "t"), (1, "t"), (1, "u"))],
            ("t", "u"),
            3 / 4,
        ),
    ],
)
def test_chance_is_the_most_frequent_class_or_a_guess(
    examples: list[Example], parts: tuple[str, ...], chance: float | None
) -> None:
    class Rows:
        def __init__(self) -> None:
            self.examples = {"test": examples}
            self.parts = parts

    assert chance_of(Rows()) == (None if chance is None else pytest.approx(chance))  # type: ignore[arg-type]


def test_only_seeds_that_both_have_are_paired() -> None:
    a = {"runs": [{"seed": 0}, {"seed": 2}], "rows": ["a0", "a2"]}
    b = {"runs": [{"seed": 1}, {"seed": 2}], "rows": ["b1", "b2"]}
    assert _same_seeds(a, b) == (["a2"], ["b2"])


def scored(right: int, characters: int, matched: int | None = None, n: int = 30) -> dict[str, Any]:
    """A method of one seed, of whose rows so many are right in each way."""
    counts = {"accuracy": right, "accuracy_per_character": characters, "exact_match": matched}
    hits = {name: [i < k for i in range(n)] for name, k in counts.items() if k is not None}
    rows = {"hits": hits, "row_loss": [1.0 + i / n for i in range(n)], "row_tokens": [1] * n}
    return {"runs": [{"seed": 0}], "rows": [rows]}


@pytest.mark.parametrize(
    ("metric", "tested", "difference"),
    [
        ("accuracy_per_character", "accuracy_per_character", 20 / 30),
        ("exact_match", "exact_match", -10 / 30),
        ("accuracy", "accuracy", 1 / 30),
        ("f1", "accuracy", 1 / 30),
        ("loss", "accuracy", 1 / 30),
    ],
)
def test_methods_are_tested_by_the_hits_of_the_metric_that_leads(metric: str, tested: str, difference: float) -> None:
    found = {"x": {"lora": scored(10, 5, 20), "a": scored(11, 25, 10)}}
    right, loss = _tests("lora", [{"name": "x", "metric": metric}], found)
    assert (right["metric"], loss["metric"]) == (tested, "loss")
    assert right["difference"] == pytest.approx(difference)
    assert right["test"] == "exact McNemar test over test rows"
    assert loss["difference"] == 0


def test_where_nothing_is_predicted_only_the_loss_is_tested() -> None:
    found = {"x": {"lora": scored(1, 1), "a": scored(1, 1)}}
    for method in found["x"].values():
        method["rows"][0]["hits"] = {}
    (only,) = _tests("lora", [{"name": "x", "metric": "perplexity"}], found)
    assert only["metric"] == "loss"
