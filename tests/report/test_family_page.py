"""The page of a comparison renders whatever is there, loads nothing, and trusts no name."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import pytest
import synthetic_compare as synthetic

from guilomo.errors import GuilomoError
from guilomo.report.family import render_comparison
from guilomo.report.units import DASH, THIN


@pytest.fixture(scope="module")
def page() -> str:
    return render_comparison(synthetic.comparison())


def small(**changes: Any) -> dict[str, Any]:
    return synthetic.comparison(methods=4, tasks=2, seeds=2, **changes)


class Cells(HTMLParser):
    """The text of the cells of every table row; and that every tag is closed."""

    void = frozenset({"meta", "br", "use", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.void:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        return

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def parsed(page: str) -> Cells:
    parser = Cells()
    parser.feed(page)
    return parser


def test_full_page_has_every_section_and_no_excuse(page: str) -> None:
    assert 'class="absent"' not in page
    for text in ("GuiLoMo (searched)", "guilomo compare recipes/family.yaml", "scienceqa is left out of the verdict"):
        assert text in page
    for picture in (
        "Difference of every method",
        "against its trainable",
        "against its step",
        "Mean ranks",
        "Held-out",
    ):
        assert picture in page


def test_tags_are_balanced(page: str) -> None:
    assert parsed(page).open == []


def test_nothing_is_loaded(page: str) -> None:
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#)""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "<script" not in page
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_a_paper_may_be_an_address_and_stays_text() -> None:
    compare = small()
    compare["methods"][0]["paper"] = "https://arxiv.org/abs/2106.09685"
    page = render_comparison(compare)
    assert page.count("https://") == 1
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#)""", page)


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    found = re.findall(r'\sid="([^"]+)"', page)
    assert len(found) == len(set(found))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(found)


def test_pictures_follow_the_colour_scheme(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)


def test_every_number_of_the_table_is_in_the_page() -> None:
    compare = small()
    rows = [row for row in parsed(render_comparison(compare)).rows if len(row) == 8][1:]
    order = sorted(compare["methods"], key=lambda method: method["mean_rank"])
    assert len(rows) == len(order)
    for row, method in zip(rows, order, strict=True):
        assert method["label"] in row[0]
        assert method["summary"] in row[0]
        assert method["paper"] in row[0]
        for cell, entry in zip(row[1:3], method["tasks"].values(), strict=True):
            assert f"{100 * entry['mean']:.1f}{THIN}%" in cell
            assert f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]" in cell
        assert row[3] == f"{method['mean_rank']:.2f}"
        for column, key in ((4, "parameters"), (5, "active_parameters")):
            assert f"{method['tasks']['sst2'][key]:,.0f}" in row[column]
        for column, values in (
            (6, [entry["step_time_ratio"]["median"] for entry in method["tasks"].values()]),
            (7, [entry["peak_bytes_ratio"] for entry in method["tasks"].values()]),
        ):
            ends = dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values)))
            assert row[column] == DASH.join(ends) + "×"
    for test in compare["tests"]:
        if test["metric"] != "accuracy":
            continue
        label = synthetic.METHODS[test["method"]][0]
        cell = next(row for row in rows if label in row[0])[1 + ["sst2", "mrpc"].index(test["task"])]
        assert f"{abs(100 * test['difference']):.1f}{THIN}pp" in cell
        main = cell.split("loss")[0]
        assert ("better" in main or "worse" in main) == (test["p_corrected"] < 0.05)


def test_names_are_escaped() -> None:
    evil = '"><script>alert(1)</script>$x_{$'
    compare = small(name=evil, command=evil, verdict=[evil], config={evil: evil})
    for method in compare["methods"][:2]:
        method |= {"label": evil, "summary": evil, "paper": evil}
    compare["tasks"][0]["chance_note"] = evil
    compare["tasks"][0]["above_chance"] = False
    synthetic.fail(compare, "dora", "mrpc", [0, 1], evil)
    page = render_comparison(compare)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert evil in unescape(page)


def test_empty_comparison_says_what_is_missing() -> None:
    page = render_comparison({"schema": 1})
    assert "Unnamed comparison" in page
    assert page.count('class="absent"') >= 8
    assert "<svg" not in page
    assert parsed(page).open == []


def test_parts_may_be_null() -> None:
    compare = small()
    assert render_comparison(dict.fromkeys(compare) | {"schema": 1})
    method = dict.fromkeys(compare["methods"][0])
    task = dict.fromkeys(compare["tasks"][0])
    assert "unnamed" in render_comparison(compare | {"methods": [method], "tasks": [task]})
    for entry in (entry for method in compare["methods"] for entry in method["tasks"].values()):
        for key in entry:
            entry[key] = None
    page = render_comparison(compare | {"friedman": None, "tests": []})
    assert "Of 16 trainings, 16 are missing." in page


def test_one_task_and_one_seed() -> None:
    compare = synthetic.comparison(methods=3, tasks=1, seeds=1, friedman=None)
    for method in compare["methods"]:
        method["tasks"]["sst2"] |= {"low": None, "high": None}
    page = render_comparison(compare)
    assert "3 methods × 1 seed<" in page
    assert "too few results for a critical difference" in page
    assert "Mean ranks of the methods" in page


def test_costs_may_be_missing() -> None:
    compare = small()
    for entry in (entry for method in compare["methods"] for entry in method["tasks"].values()):
        entry |= {"step_time_ratio": None, "peak_bytes_ratio": None}
    page = render_comparison(compare)
    assert "Step times were not measured" in page
    assert "against its trainable parameters" in page


def test_only_the_reference_ran() -> None:
    compare = synthetic.comparison(methods=1, tasks=2, seeds=1, friedman=None)
    page = render_comparison(compare)
    assert "Nothing was tested against LoRA (PEFT) yet" in page
    assert "no mean ranks of at least two methods" in page


def test_failures_are_shown() -> None:
    compare = small(status="partial")
    synthetic.fail(compare, "guilomo", "sst2", [0, 1], "out of memory at step 3")
    compare["methods"][2]["tasks"]["mrpc"]["cells"].pop()
    page = render_comparison(compare)
    assert "not finished" in page
    assert "Of 16 trainings, 2 failed and 1 is missing." in page
    assert page.count("out of memory at step 3") == 2
    assert ">failed<" in page
    assert "1 of 2 seeds missing" in page


def test_unknown_schema_is_refused() -> None:
    with pytest.raises(GuilomoError, match=r"compare\.schema = 99"):
        render_comparison({"schema": 99})
    with pytest.raises(GuilomoError, match="a mapping with the key 'schema'"):
        render_comparison([])  # type: ignore[arg-type]


def test_render_is_reproducible() -> None:
    assert render_comparison(small()) == render_comparison(small())
