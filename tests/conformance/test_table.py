"""docs/conformance.md names a test for every line, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_line_names_a_test() -> None:
    lines = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("| what", "| ---"))]
    assert len(lines) > 40
    assert not [line for line in lines if not NAMED.search(line)]


def test_every_test_named_exists() -> None:
    for path, name in NAMED.findall(PAGE):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_every_file_here_is_named() -> None:
    named = {path for path, _ in NAMED.findall(PAGE)}
    files = {str(p.relative_to(ROOT)) for p in Path(__file__).parent.glob("test_*.py") if p != Path(__file__)}
    assert files <= named
