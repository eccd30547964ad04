"""The page of a comparison and its tables as files: one self-contained HTML file, CSV and LaTeX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guilomo.files import replacing
from guilomo.report.family import facts, rows
from guilomo.report.family.latex import methods_tex
from guilomo.report.family.pictures import further_differences, pictures_of, router_pictures
from guilomo.report.family.plans import loads_of, plans_of
from guilomo.report.family.reading import (
    Comparison,
    Task,
    alpha_of,
    check_comparison,
    reference_label,
    tasks_of,
)
from guilomo.report.family.spreadsheets import cells_csv, methods_csv
from guilomo.report.family.sweeps import edges_of
from guilomo.report.palette import DARK, LIGHT
from guilomo.report.templates import filled
from guilomo.report.units import share, title_of


def render_comparison(compare: Comparison) -> str:
    """The whole page as HTML text.

    Args:
        compare: the parsed compare.json; any part may be missing, the page then says so.

    Raises:
        GuilomoError: the file has a schema this version does not know, or an unusable allocation.
    """
    check_comparison(compare)
    return filled("compare.html.j2", _context(compare))


def write_comparison(compare: Comparison, folder: str | Path) -> Path:
    """Writes compare.html, compare.csv, table.csv and table.tex, each in one step.

    Args:
        compare: the parsed compare.json.
        folder: where they go; it is created.

    Returns:
        The page.

    Raises:
        GuilomoError: as for `render_comparison`, or a file cannot be written.
    """
    page = Path(folder) / "compare.html"
    texts = {
        "compare.html": render_comparison(compare),
        "compare.csv": cells_csv(compare),
        "table.csv": methods_csv(compare),
        "table.tex": methods_tex(compare),
    }
    for name, text in texts.items():
        content = text.encode()
        with replacing(page.with_name(name), len(content)) as unfinished:
            unfinished.write_bytes(content)
    return page


def _context(compare: Comparison) -> dict[str, Any]:
    """Everything the template places."""
    loads = loads_of(compare)
    return {
        "name": compare.get("name"),
        "command": compare.get("command"),
        "light": LIGHT,
        "dark": DARK,
        "reference": reference_label(compare),
        "alpha": share(alpha_of(compare)),
        "pictures": pictures_of(compare),
        "further": further_differences(compare),
        "tests": rows.test_rows(compare),
        "facts": facts.facts_of(compare),
        "partial": compare.get("status") == "partial",
        "undone": facts.undone(compare),
        "verdict": list(compare.get("verdict") or []),
        "left_out": facts.left_out(compare),
        "tasks": [_heading(task) for task in tasks_of(compare)],
        "rows": rows.method_rows(compare),
        "mixtures": rows.mixtures(compare),
        "ranks": facts.rank_facts(compare),
        "plans": [plan.names for plan in plans_of(compare)],
        "routers": rows.router_rows(compare),
        "load_task": loads[0].name if loads else "",
        "loads": router_pictures(compare),
        "edges": edges_of(compare),
        "failures": rows.failure_rows(compare),
        "budgets": facts.budget_notes(compare),
        "data": rows.task_rows(compare),
        "made": facts.made_of(compare),
        "config": json.dumps(compare.get("config") or {}, indent=2, ensure_ascii=False, default=str),
    }


def _heading(task: Task) -> dict[str, Any]:
    """A task as the head of a column."""
    way = "higher is better" if task.higher else "lower is better"
    metric = f"{title_of(task.metric)}, {way}" if task.metric else ""
    return {"name": task.name, "metric": metric, "counted": task.counted}
