"""The page renders whatever a run left behind, loads nothing, and trusts no name."""

from __future__ import annotations

import os
import re
import stat
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic_results as synthetic

from guilomo.errors import GuilomoError
from guilomo.report import render, write_report


@pytest.fixture(scope="module")
def page() -> str:
    return render(synthetic.results())


def ids(page: str) -> list[str]:
    return re.findall(r'\sid="([^"]+)"', page)


def test_full_page_has_every_section_and_no_excuse(page: str) -> None:
    for text in ("GuiLoMo (searched)", "no difference shown", "sha256:9f2c", "guilomo run recipes/demo.yaml"):
        assert text in page
    assert 'class="absent"' not in page
    # Seven pictures, each for a desktop and for a phone.
    assert page.count("<svg") == 14


def test_nothing_is_loaded(page: str) -> None:
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#)""", page)
    assert not re.findall(r"url\((?!#)", page)
    assert "<script" not in page
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    found = ids(page)
    assert len(found) == len(set(found))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', page)) <= set(found)


def test_tags_are_balanced(page: str) -> None:
    class Balance(HTMLParser):
        void = frozenset({"meta", "br", "use", "path"})

        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in self.void:
                self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: Any) -> None:
            return

        def handle_endtag(self, tag: str) -> None:
            if tag not in self.void:
                assert self.open.pop() == tag

    parser = Balance()
    parser.feed(page)
    assert parser.open == []


def test_pictures_follow_the_colour_scheme(page: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--accent)" in drawings
    assert not re.findall(r"#[0-9a-f]{6}\b", drawings)


def test_render_is_reproducible() -> None:
    results = {"schema": 1, "methods": [synthetic.method("lora")]}
    assert render(results) == render(results)


def test_empty_results_say_what_is_missing() -> None:
    page = render({"schema": 1})
    assert "Unnamed run" in page
    assert page.count('class="absent"') >= 8
    assert "<svg" not in page


def test_run_interrupted_after_the_search() -> None:
    page = render(synthetic.results(status="partial", methods=[], tests=[], verdict=[]))
    assert "not finished" in page
    assert "No method has been measured" in page
    assert "no allocation yet" in page
    assert "Expected expert count" in page


def test_allocation_only() -> None:
    entry = {"name": "mine", "allocation": synthetic.plan("guilomo").to_dict()}
    page = render({"schema": 1, "name": "by hand", "methods": [entry]})
    assert "Total rank per module of mine" in page
    assert "made no search" in page


def test_parts_may_be_null() -> None:
    results = synthetic.results(search=None)
    assert render(dict.fromkeys(results) | {"schema": 1})
    method = dict.fromkeys(results["methods"][0])
    assert "unnamed" in render(results | {"methods": [method], "search": dict.fromkeys(synthetic.search())})


def test_perplexity_as_primary_metric() -> None:
    methods = [synthetic.method(name) for name in ("guilomo", "lora")]
    for method, mean in zip(methods, (12.3, 11.9), strict=True):
        method["summary"] = {"perplexity": {"mean": mean, "low": mean - 0.2, "high": mean + 0.2, "seeds": 1}}
        method["runs"] = [{"seed": 0, "metrics": {"perplexity": {"value": mean}}}]
    test = {"a": "guilomo", "b": "lora", "metric": "perplexity", "difference": 0.4, "p": 0.01}
    page = render(synthetic.results(methods=methods, primary_metric="perplexity", tests=[test], search=None))
    assert "lower is better" in page
    assert "further left is better" in page
    assert "best first: LoRA rank 8, GuiLoMo" in page
    assert ">worse<" in page
    assert "12.30" in page
    assert "Guessing" not in page


def test_names_are_escaped() -> None:
    evil = '"><script>alert(1)</script>$x_{$'
    plan = synthetic.plan("guilomo").to_dict()
    first = next(iter(plan["modules"]))
    plan["modules"][f"layer.0.{evil}"] = plan["modules"].pop(first)
    method = synthetic.method("guilomo") | {"label": evil, "allocation": plan}
    page = render(
        synthetic.results(name=evil, command=evil, methods=[method], verdict=[evil], config={evil: evil}, search=None)
    )
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_unknown_schema_is_refused() -> None:
    with pytest.raises(GuilomoError, match=r"results\.schema = 99"):
        render({"schema": 99})


@pytest.mark.parametrize("content", [[], {}, {"name": "x"}, None])
def test_what_is_not_the_results_of_a_run_is_refused(content: Any) -> None:
    with pytest.raises(GuilomoError, match="a mapping with the key 'schema'"):
        render(content)


def test_write_replaces_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run" / "report.html"
    write_report({"schema": 1, "name": "first"}, target)
    assert stat.S_IMODE(target.stat().st_mode) & stat.S_IRUSR

    def fail(source: Any, target: Any) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(GuilomoError, match=r"report\.html could not be written \(disk gone\)"):
        write_report({"schema": 1, "name": "second"}, target)
    assert "first" in target.read_text(encoding="utf-8")
    assert list(target.parent.iterdir()) == [target]
