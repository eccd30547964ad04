"""Plans for people: rows, a text table, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from guilomo.allocation.costs import RouterCost, module_active_parameters, module_parameters
from guilomo.allocation.modules import ModulePlan
from guilomo.allocation.names import layers_of, site

COLUMNS = ("module", "experts", "ranks", "top_k", "parameters", "active_parameters")


class ModuleChange(NamedTuple):
    """One module planned differently; None stands for a module the plan does not list."""

    module: str
    before: ModulePlan | None
    after: ModulePlan | None


def changes(before: Mapping[str, ModulePlan], after: Mapping[str, ModulePlan]) -> list[ModuleChange]:
    """Every module whose plan differs, in the order of `before`, then modules only in `after`."""
    pairs = [ModuleChange(name, before.get(name), after.get(name)) for name in {**before, **after}]
    return [change for change in pairs if change.before != change.after]


def describe_changes(differences: Sequence[ModuleChange]) -> str:
    """One line per change, such as `layer.0.query: 4×8 top 2 -> 2×4 top 2`."""
    if not differences:
        return "no differences"
    return "\n".join(f"{name}: {_brief(before)} -> {_brief(after)}" for name, before, after in differences)


def _brief(plan: ModulePlan | None) -> str:
    if plan is None:
        return "absent"
    if not plan.adapted:
        return "not adapted"
    more = [*(["shared A"] if plan.shared_a else []), *([f"sequential {r}"] if (r := plan.sequential_rank) else [])]
    more += [f"{plan.role} of {plan.block}"] if plan.role else []
    return ", ".join([f"{abbreviate(plan.ranks)} top {plan.top_k}", *more])


def abbreviate(ranks: Sequence[int]) -> str:
    """`4×8` for four experts of rank 8, `3,1,2` for mixed ranks, `-` for none."""
    if not ranks:
        return "-"
    return f"{len(ranks)}×{ranks[0]}" if len(set(ranks)) == 1 else ",".join(map(str, ranks))


def module_rows(modules: Mapping[str, ModulePlan], router: RouterCost) -> list[dict[str, Any]]:
    """One record per module; `layer` is the 0-based index and `projection` the name inside the layer."""
    layers = layers_of(modules)
    return [
        {
            "module": name,
            "layer": layers[name],
            "projection": site(name)[1],
            "experts": plan.experts,
            "ranks": plan.ranks,
            "top_k": plan.top_k if plan.adapted else 0,
            "parameters": module_parameters(plan, router),
            "active_parameters": module_active_parameters(plan, router),
        }
        for name, plan in modules.items()
    ]


def plain_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as aligned text with totals (experts, packed rank, parameters) in the last line."""
    body = [[_cell(row, column) for column in COLUMNS] for row in rows]
    table = [[column.replace("_", " ") for column in COLUMNS], *body, _totals(rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    return "\n".join(_aligned(line, widths) for line in table)


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if column == "ranks":
        return abbreviate(value)
    return value if isinstance(value, str) else f"{value:,.0f}"


def _totals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    experts, parameters, active = (
        sum(row[column] for row in rows) for column in ("experts", "parameters", "active_parameters")
    )
    rank = sum(sum(row["ranks"]) for row in rows)
    return ["total", f"{experts:,}", f"sum {rank:,}", "", f"{parameters:,}", f"{active:,.0f}"]


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([first, *rest]).rstrip()
