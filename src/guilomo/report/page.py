"""The page of a run: one self-contained HTML file, no script, nothing loaded from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guilomo.files import replacing
from guilomo.report import rows
from guilomo.report.facts import facts_of, made_of, metric_facts, search_facts, size_facts
from guilomo.report.grid import grid_of
from guilomo.report.heatmap import DETAILED_ROWS
from guilomo.report.palette import DARK, LIGHT
from guilomo.report.pictures import pictures_of
from guilomo.report.reading import Results, allocation_of, check_schema, label_of, lead_of, methods_of, part
from guilomo.report.templates import filled
from guilomo.report.units import duration


def render(results: Results) -> str:
    """The whole page as HTML text.

    Args:
        results: the parsed results.json; any part may be missing, the page then says so.

    Raises:
        GuilomoError: the results have a schema this version does not know, or an unusable allocation.
    """
    check_schema(results)
    return filled("page.html.j2", _context(results))


def write_report(results: Results, path: str | Path) -> Path:
    """Writes the page in one step: a reader sees the old file or the new one, never half of it.

    Args:
        results: the parsed results.json.
        path: the HTML file; its folder is created.

    Raises:
        GuilomoError: as for `render`, or the file cannot be written.
    """
    target, content = Path(path), render(results).encode()
    with replacing(target, len(content)) as unfinished:
        unfinished.write_bytes(content)
    return target


def _context(results: Results) -> dict[str, Any]:
    """Everything the template places."""
    lead, hardware = lead_of(results), part(results, "hardware")
    plan = allocation_of(lead)
    return {
        "name": results.get("name"),
        "command": results.get("command"),
        "machine": hardware.get("gpu") or hardware.get("cpu"),
        "light": LIGHT,
        "dark": DARK,
        "pictures": pictures_of(results),
        "lead": label_of(lead) if lead else "",
        "detailed": plan is not None and len(grid_of(plan.modules).rows) <= DETAILED_ROWS,
        "facts": facts_of(results),
        "metric": metric_facts(results),
        "sizes": size_facts(results),
        "verdict": list(results.get("verdict") or []),
        "rows": rows.comparison_rows(results),
        "parts": rows.part_rows(results),
        "swept": any(map(rows.rate_text, methods_of(results))),
        "tests": rows.test_rows(results),
        "routers": rows.router_rows(results),
        "costs": rows.cost_rows(results),
        "total": duration(part(results, "seconds").get("total")),
        "search": search_facts(results),
        "made": made_of(results),
        "config": json.dumps(results.get("config") or {}, indent=2, ensure_ascii=False, default=str),
        "partial": results.get("status") == "partial",
        "ratios": rows.plain_lora(results) is not None,
    }
