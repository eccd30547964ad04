"""Which accuracy methods of a run are tested by: that which the run leads with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from guilomo.run.compare import verdict
from guilomo.run.files import read_json
from tiny_runs import run_of


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_per_character", "exact_match"])
def test_the_hits_are_those_of_the_leading_metric(text_recipe: Any, metric: str) -> None:
    evaluation = {"generate": metric == "exact_match", "metric": metric}
    job = run_of(text_recipe("causal_lm", methods=["guilomo", "uniform"], seeds=[0, 1], evaluation=evaluation))
    results = job.all()
    assert results["primary_metric"] == metric
    right, loss = results["tests"]
    assert (right["metric"], loss["metric"]) == (metric, "loss")
    hits = {}
    for method in ("guilomo", "uniform"):
        folders = [job.config.folder / "methods" / method / f"seed-{seed}" for seed in (0, 1)]
        found = [read_json(folder / "result.json") for folder in folders]
        hits[method] = np.array([one["rows"]["hits"][metric] for one in found], dtype=float)
        assert [one["metrics"][metric]["value"] for one in found] == pytest.approx(hits[method].mean(axis=1).tolist())
    assert right["difference"] == pytest.approx((hits["guilomo"] - hits["uniform"]).mean())


def test_the_verdict_says_which_accuracy() -> None:
    methods = [{"name": n, "label": n.upper(), "kind": k, "runs": [0, 1, 2]} for n, k in (("s", "searched"), ("l", ""))]
    test = {"a": "s", "b": "l", "metric": "accuracy_per_character", "difference": 0.1, "p_corrected": 0.01}
    said = "S has better accuracy per character than L on these test rows (Holm-corrected p < 0.05)."
    assert verdict(methods, [test]) == [said]
    assert verdict(methods, [{**test, "metric": "exact_match", "p_corrected": 0.5}]) == [
        "In exact match, these results cannot tell S from L."
    ]
