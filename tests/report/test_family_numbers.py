"""The tables of a comparison hold what compare.json holds, and no sign in a name breaks them."""

from __future__ import annotations

import csv
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import synthetic_compare as synthetic

from guilomo.report.family import rows
from guilomo.report.family.against import against, metrics_tested
from guilomo.report.family.latex import escaped, methods_tex
from guilomo.report.family.reading import result_of, tasks_of
from guilomo.report.family.spreadsheets import cells_csv, methods_csv
from guilomo.report.units import DASH, MINUS, THIN, p_value, plain


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text)))


def small() -> dict[str, Any]:
    return synthetic.comparison(methods=4, tasks=2, seeds=2)


def same(text: str, value: Any) -> bool:
    """Whether a field of a CSV file is exactly the value of the JSON."""
    if value is None:
        return text == ""
    return float(text) == value if isinstance(value, (int, float)) else text == str(value)


def test_cells_csv_has_every_seed_and_every_number() -> None:
    compare = small()
    found = table(cells_csv(compare))
    cells = [
        (method, task, cell)
        for method in compare["methods"]
        for task in compare["tasks"]
        for cell in method["tasks"][task["name"]]["cells"]
    ]
    assert len(found) == len(cells) == 4 * 2 * 2
    for row, (method, task, cell) in zip(found, cells, strict=True):
        entry = method["tasks"][task["name"]]
        assert (row["method"], row["task"], row["seed"]) == (method["name"], task["name"], str(cell["seed"]))
        for name in ("status", "value", "train_seconds", "error", "folder"):
            assert same(row[name], cell[name])
        for name in ("learning_rate", "parameters", "active_parameters"):
            assert same(row[name], entry[name])
        for name, value in cell["metrics"].items():
            assert same(row[f"metric:{name}"], value)


def test_cells_csv_lists_what_never_ran() -> None:
    compare = small()
    del compare["methods"][0]["tasks"]["mrpc"]
    compare["methods"][1]["tasks"]["sst2"]["cells"].pop()
    found = table(cells_csv(compare))
    assert len(found) == 16
    assert sum(row["status"] == "missing" for row in found) == 3
    assert all(row["value"] == "" for row in found if row["status"] == "missing")


def test_methods_csv_has_every_number() -> None:
    compare = small()
    found = table(methods_csv(compare))
    assert [row["name"] for row in found] == [method["name"] for method in compare["methods"]]
    plain = ("mean", "low", "high", "rank", "learning_rate", "parameters", "active_parameters", "peak_bytes_ratio")
    for row, method in zip(found, compare["methods"], strict=True):
        assert same(row["mean_rank"], method["mean_rank"])
        for task, entry in method["tasks"].items():
            for name in plain:
                assert same(row[f"{task}:{name}"], entry[name])
            for name, value in entry["step_time_ratio"].items():
                assert same(row[f"{task}:step_time_ratio_{name}"], value)
    for test in compare["tests"]:
        row = next(row for row in found if row["name"] == test["method"])
        for name in ("difference", "low", "high", "p", "p_corrected"):
            assert same(row[f"{test['task']}:{test['metric']}:{name}"], test[name])
    assert next(row for row in found if row["name"] == "lora")["sst2:accuracy:difference"] == ""


def test_csv_quotes_what_would_break_a_line() -> None:
    compare = small()
    odd = 'a "b", c;\nd'
    compare["methods"][0]["label"] = odd
    synthetic.fail(compare, "lora", "sst2", [0], odd)
    found = table(cells_csv(compare))
    assert found[0]["label"] == odd
    assert found[0]["error"] == odd
    assert found[0]["value"] == ""
    assert len(found) == 16


def lines_of(compare: dict[str, Any]) -> list[list[str]]:
    """The rows between the rules of the LaTeX table, as cells."""
    text = methods_tex(compare)
    inside = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    return [line.removesuffix(r" \\").split(" & ") for line in inside.strip().split("\n")]


def test_tex_has_one_row_per_method_with_its_numbers() -> None:
    compare = small()
    found = lines_of(compare)
    order = sorted(compare["methods"], key=lambda method: method["mean_rank"])
    assert [row[0] for row in found] == [escaped(method["label"]) for method in order]
    for row, method in zip(found, order, strict=True):
        for cell, entry in zip(row[1:3], method["tasks"].values(), strict=True):
            assert f"{100 * entry['mean']:.1f}" in cell
            assert cell.endswith(f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]")
        assert f"{method['mean_rank']:.2f}" in row[3]
        assert f"{method['tasks']['sst2']['parameters']:,}" in row[4]
        assert f"{method['tasks']['sst2']['step_time_ratio']['median']:.2f}" in row[5]


def test_tex_sets_the_best_of_every_column_in_bold() -> None:
    compare = small()
    for task in ("sst2", "mrpc"):
        means = {method["label"]: method["tasks"][task]["mean"] for method in compare["methods"]}
        column = 1 + ["sst2", "mrpc"].index(task)
        bold = [row[0] for row in lines_of(compare) if r"\textbf" in row[column]]
        assert bold == [escaped(max(means, key=means.__getitem__))]
    assert [r"\textbf" in row[3] for row in lines_of(compare)] == [True, False, False, False]


def test_tex_lower_is_better_and_unfinished_methods_do_not_compete() -> None:
    compare = small()
    for task in compare["tasks"]:
        task |= {"metric": "perplexity", "higher_is_better": False}
    means = {method["name"]: method["tasks"]["sst2"]["mean"] for method in compare["methods"]}
    best, second, *_ = sorted(means, key=means.__getitem__)
    labels = {method["name"]: escaped(method["label"]) for method in compare["methods"]}
    assert [row[0] for row in lines_of(compare) if r"\textbf" in row[1]] == [labels[best]]
    synthetic.fail(compare, best, "sst2", [0])
    found = lines_of(compare)
    assert [row[0] for row in found if r"\textbf" in row[1]] == [labels[second]]
    assert [row[0] for row in found if r"\dagger" in row[1]] == [labels[best]]


def test_tex_stars_follow_the_corrected_p() -> None:
    compare = small()
    starred = {(row[0], place) for row in lines_of(compare) for place in (1, 2) if "^{*}" in row[place]}
    labels = {method["name"]: escaped(method["label"]) for method in compare["methods"]}
    places = {"sst2": 1, "mrpc": 2}
    own = [test for test in compare["tests"] if test["metric"] == "accuracy"]
    expected = {(labels[test["method"]], places[test["task"]]) for test in own if test["p_corrected"] < 0.05}
    assert starred == expected
    assert expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 % of $x_1$ & {y} #2", r"50 \% of \$x\_1\$ \& \{y\} \#2"),
        ("a\\b^c~d", r"a\textbackslash{}b\textasciicircum{}c\textasciitilde{}d"),
        (f"{MINUS}1{DASH}2{THIN}%", r"$-$1--2\,\%"),
        ("MoLA ▽\n2×4", r"MoLA $\bigtriangledown$ 2$\times$4"),
    ],
)
def test_tex_escapes(text: str, expected: str) -> None:
    assert escaped(text) == expected


def test_table_cells_show_the_json_rounded() -> None:
    compare = small()
    task = tasks_of(compare)[0]
    tests = {(t["method"], t["metric"]): t for t in compare["tests"] if t["task"] == "sst2"}
    for method in compare["methods"]:
        entry, cell = method["tasks"]["sst2"], rows.cell_of(compare, method, task)
        assert cell["value"] == f"{100 * entry['mean']:.1f}{THIN}%"
        assert cell["interval"] == f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
        assert cell["alarm"] == cell["missing"] == ""
        if method["name"] == "lora":
            assert cell["reference"]
            assert cell["difference"] == ""
            continue
        (other,) = cell["further"]
        loss = tests[method["name"], "loss"]
        assert other["difference"].replace(MINUS, "-") == f"loss {loss['difference']:+.3f}"
        assert other["outcome"] == ("even" if loss["p_corrected"] >= 0.05 else "better")
        test = tests[method["name"], "accuracy"]
        assert cell["difference"].replace(MINUS, "-") == f"{100 * test['difference']:+.1f}{THIN}pp"
        decided = "better" if test["difference"] > 0 else "worse"
        assert cell["outcome"] == (decided if test["p_corrected"] < 0.05 else "even")


def test_failed_and_missing_cells_are_named() -> None:
    compare = small()
    synthetic.fail(compare, "guilomo", "sst2", [1])
    synthetic.fail(compare, "rslora", "sst2", [0, 1])
    compare["methods"][3]["tasks"]["sst2"]["cells"] = []
    task = tasks_of(compare)[0]
    cells = {method["name"]: rows.cell_of(compare, method, task) for method in compare["methods"]}
    assert cells["guilomo"]["alarm"] == "1 of 2 seeds failed"
    assert (cells["rslora"]["alarm"], cells["rslora"]["value"]) == ("failed", DASH)
    assert cells["dora"]["missing"] == "missing"
    assert [len(rows.failure_rows(compare)), rows.failure_rows(compare)[0]["error"]] == [3, "the loss was nan"]


def test_no_corrected_p_is_no_finding() -> None:
    compare = small()
    for test in compare["tests"]:
        test |= {"p": 1e-9, "p_corrected": None}
    method, task = compare["methods"][1], tasks_of(compare)[0]
    found = against(compare, method, task)
    assert found is not None
    assert found.outcome == ""
    assert rows.cell_of(compare, method, task)["p"] == ""


def test_direction_follows_the_task() -> None:
    compare = small()
    method, task = compare["methods"][1], tasks_of(compare)[0]
    assert against(compare, method, task).outcome == "better"  # type: ignore[union-attr]
    compare["tasks"][0]["higher_is_better"] = False
    assert against(compare, method, tasks_of(compare)[0]).outcome == "worse"  # type: ignore[union-attr]


def test_tests_on_another_metric_say_so() -> None:
    compare = small()
    for test in compare["tests"]:
        test |= {"metric": "loss", "difference": -0.05, "p_corrected": 0.001}
    compare["tests"] = compare["tests"][::2]
    cell = rows.cell_of(compare, compare["methods"][1], tasks_of(compare)[0])
    assert cell["difference"] == f"loss {MINUS}0.050"
    assert cell["outcome"] == "better"


def test_a_metric_without_tests_is_stood_for_by_one_of_the_same_side() -> None:
    compare = small()
    for metric, higher, first in (
        ("perplexity", False, "loss"),
        ("matthews", True, "accuracy"),
        ("loss", False, "loss"),
    ):
        compare["tasks"][0] |= {"metric": metric, "higher_is_better": higher}
        assert metrics_tested(compare, tasks_of(compare)[0])[0] == first
    compare["tests"] = []
    assert metrics_tested(compare, tasks_of(compare)[0]) == ["loss"]


def test_every_test_has_a_row() -> None:
    compare = small()
    found = rows.test_rows(compare)
    keys = [(row["method"], row["task"], row["metric"].lower()) for row in found]
    labels = {method["name"]: method["label"] for method in compare["methods"]}
    assert sorted(keys) == sorted((labels[t["method"]], t["task"], t["metric"]) for t in compare["tests"])
    for test in compare["tests"]:
        row = found[keys.index((labels[test["method"]], test["task"], test["metric"]))]
        assert (row["says"] == "not told apart") == (test["p_corrected"] >= 0.05)
        assert row["corrected"] == p_value(test["p_corrected"])


def test_spans_over_tasks() -> None:
    assert rows.span_text([1.0, None, 1.001], plain, "×") == "1.00×"
    assert rows.span_text([1.31, 1.2, None], plain, "×") == f"1.20{DASH}1.31×"
    assert rows.span_text([None], plain, "×") == DASH


def test_numbers_that_are_none_or_nan() -> None:
    compare = small()
    entry = compare["methods"][1]["tasks"]["sst2"]
    entry |= {"mean": float("nan"), "step_time_ratio": None, "parameters": None}
    result = result_of(compare, compare["methods"][1], tasks_of(compare)[0])
    assert (result.mean, result.step, result.parameters) == (None, None, None)
    assert methods_tex(compare)


def test_files_are_utf8(tmp_path: Path) -> None:
    from guilomo.report.family import write_comparison

    page = write_comparison(small(), tmp_path / "new")
    assert page == tmp_path / "new" / "compare.html"
    names = {"compare.html", "compare.csv", "table.csv", "table.tex"}
    assert {path.name for path in page.parent.iterdir()} == names
    assert all(path.read_text(encoding="utf-8") for path in page.parent.iterdir())
