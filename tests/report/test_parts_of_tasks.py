"""Scores on the parts of a mixed task: on the pages, in the terminal, in the spreadsheet; nothing of single tasks."""

from __future__ import annotations

import csv
from io import StringIO
from typing import Any

import synthetic_compare
import synthetic_results
from rich.console import Console

from guilomo.report import parts_table, render
from guilomo.report.family.page import render_comparison
from guilomo.report.family.rows import mixtures
from guilomo.report.family.spreadsheets import methods_csv
from guilomo.report.rows import part_rows


def _score(mean: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "seeds": 3, "n": 100}


def mixed_results() -> dict[str, Any]:
    found = synthetic_results.results()
    for place, method in enumerate(found["methods"]):
        method["parts"] = {
            "fish": {"loss": _score(1.5), "accuracy": _score(0.7 + place / 100)},
            "fowl<b>": {"loss": _score(0.5), "accuracy": _score(0.25)},
        }
    return found


def mixed_comparison() -> dict[str, Any]:
    found = synthetic_compare.comparison(methods=3, tasks=2, seeds=2)
    task = found["tasks"][1]
    task["parts"] = ["fish", "fowl<b>"]
    for method in found["methods"]:
        scores = {"fish": {"metric": "accuracy", **_score(0.61)}, "fowl<b>": {"metric": "loss", **_score(1.25)}}
        method["tasks"][task["name"]]["parts"] = scores
    return found


def test_a_run_shows_every_part() -> None:
    found = mixed_results()
    first = part_rows(found)[0]
    assert [name for name, _, _ in first["cells"]] == [
        "fish: Accuracy",
        "fish: Loss",
        "fowl<b>: Accuracy",
        "fowl<b>: Loss",
    ]
    assert [value for _, value, _ in first["cells"]][1:] == ["1.500", "25.0\u202f%", "0.500"]
    assert first["cells"][0][1:] == ("70.0\u202f%", "[68.0, 72.0]")
    page = render(found)
    assert "On each part of the task" in page
    assert "fowl&lt;b&gt;: Accuracy" in page
    assert "fowl<b>" not in page
    console = Console(width=200, record=True)
    console.print(parts_table(found))
    assert "fish: Accuracy" in console.export_text()


def test_a_comparison_shows_every_part() -> None:
    found = mixed_comparison()
    (mixture,) = mixtures(found)
    assert mixture["parts"] == ["fish", "fowl<b>"]
    assert [cell["value"] for cell in mixture["rows"][0]["cells"]] == ["61.0\u202f%", "1.250"]
    page = render_comparison(found)
    assert f"The parts of {found['tasks'][1]['name']}" in page
    assert "fowl<b>" not in page
    row = next(csv.DictReader(StringIO(methods_csv(found))))
    name = found["tasks"][1]["name"]
    assert (row[f"{name}:fish:mean"], row[f"{name}:fowl<b>:metric"]) == ("0.61", "loss")


def test_single_tasks_have_no_parts() -> None:
    found = synthetic_results.results()
    assert part_rows(found) == []
    assert "On each part" not in render(found)
    compare = synthetic_compare.comparison(methods=3, tasks=2, seeds=2)
    assert mixtures(compare) == []
    assert "The parts of" not in render_comparison(compare)
