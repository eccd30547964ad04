"""The measured table of docs/export.md is the one its result files give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILES = ROOT / "benchmarks" / "results" / "export"
PAGE = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")


def _row(name: str, report: dict[str, Any]) -> str:
    found = report["measures"]
    form = report["to"] if report["rank"] is None else f"{report['to']}, rank {report['rank']}"
    added, kept = found["loss_added"], found["gain_kept"]
    cells = [
        name.partition("-")[0],
        form,
        f"{found['loss_routed']['value']:.3f} → {found['loss_export']['value']:.3f}",
        f"{added['value']:+.3f} [{added['low']:+.3f}, {added['high']:+.3f}]",
        f"{100 * kept['value']:.1f} % [{100 * kept['low']:.1f}, {100 * kept['high']:.1f}]",
        f"{100 * found['agreement']['value']:.1f} %",
        f"{found['divergence']['value']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_rows_are_those_of_the_files() -> None:
    rows = [_row(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(FILES.glob("*.json"))]
    shown = [line for line in PAGE.splitlines() if line.startswith(("| sst2", "| shakespeare"))]
    assert sorted(shown) == sorted(rows)
    assert len(rows) == 6


def test_perplexities_in_the_text_are_those_of_the_files() -> None:
    found = json.loads((FILES / "shakespeare-stacked.json").read_text(encoding="utf-8"))["measures"]
    for name in ("loss_routed", "loss_export"):
        assert f"{math.exp(found[name]['value']):.2f}" in PAGE
