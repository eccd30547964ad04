"""The same numbers for the terminal."""

from __future__ import annotations

from rich.table import Table

from guilomo.allocation.plan import Allocation
from guilomo.report.heatmap import rank_detail
from guilomo.report.reading import Results
from guilomo.report.rows import comparison_rows, part_rows, plain_lora
from guilomo.report.units import DASH, count


def comparison_table(results: Results) -> Table:
    """The methods with every metric, its interval, and what they cost.

    Args:
        results: the parsed results.json.
    """
    rows = comparison_rows(results)
    # rich reads square brackets as markup, so every cell that may hold one is added as plain text.
    table = Table(title=_plain(str(results.get("name") or "run")), box=None, header_style="dim", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name in [name for name, _, _ in rows[0]["metrics"]] if rows else []:
        table.add_column(_plain(name), justify="right")
    ratio = plain_lora(results) is not None
    for name in ("parameters", "active", "step vs LoRA" if ratio else "step time"):
        table.add_column(name, justify="right", no_wrap=True)
    swept = any(row["rate"] for row in rows)
    if swept:
        table.add_column("rate", justify="right", no_wrap=True)
    for row in rows:
        rate = [(row["rate"] or DASH) + (" edge" if row["edge"] else "")] if swept else []
        metrics = [_plain(f"{value} {interval}".strip()) for _, value, interval in row["metrics"]]
        step = row["step"] if ratio else row["step_ms"]
        style = "bold" if row["lead"] else None
        table.add_row(_plain(row["label"]), *metrics, row["parameters"], row["active"], step, *rate, style=style)
    return table


def parts_table(results: Results) -> Table:
    """The methods with their scores on every part of a mixed task.

    Args:
        results: the parsed results.json of a mixed task.
    """
    rows = part_rows(results)
    table = Table(title="on each part", box=None, header_style="dim", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for name, _, _ in rows[0]["cells"]:
        table.add_column(_plain(name), justify="right")
    for row in rows:
        cells = [_plain(f"{value} {interval}".strip()) for _, value, interval in row["cells"]]
        table.add_row(_plain(row["label"]), *cells, style="bold" if row["lead"] else None)
    return table


def allocation_table(allocation: Allocation) -> Table:
    """One line per module: experts, how the rank is divided, top-k, parameters with routers; totals last.

    Args:
        allocation: the plan.
    """
    table = Table(title=_plain(allocation.strategy), box=None, header_style="dim", pad_edge=False, show_footer=True)
    records = allocation.rows()
    totals = {
        "experts": count(sum(row["experts"] for row in records)),
        "rank": count(sum(module.rank for module in allocation.modules.values())),
        "divided": "",
        "top-k": "",
        "parameters": count(sum(row["parameters"] for row in records)),
    }
    table.add_column("module", footer="total")
    for name, footer in totals.items():
        table.add_column(name, footer=footer, justify="right", no_wrap=True)
    for row in records:
        module = allocation.modules[row["module"]]
        top_k = str(module.top_k) if module.adapted else DASH
        cells = (
            str(module.experts),
            str(module.rank),
            rank_detail(module) or DASH,
            top_k,
            count(row["parameters"]),
        )
        table.add_row(_plain(row["module"]), *cells, style=None if module.adapted else "dim")
    return table


def _plain(text: str) -> str:
    """Text in which nothing is read as markup."""
    return text.replace("[", r"\[")
