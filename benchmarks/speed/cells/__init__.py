"""All cells, in the order in which they run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.speed.cells import choice, compiled, decode, equality, layer, ranks, search, step, whole, wrap
from benchmarks.speed.cells.cell import Cell, Result, Setting
from guilomo.errors import unknown

__all__ = ["Cell", "Result", "Setting", "cells_for", "chosen"]


def cells_for(quick: bool, cuda: bool) -> list[Cell]:
    """The cells of a run; the quick ones are few and small, but count everything."""
    if quick:
        return [
            *equality.CELLS,
            layer.layer_cell(layer.QUICK),
            ranks.ranks_cell(512, 64, "bf16"),
            step.step_cell("small", step.QUICK),
            step.update_cell("small", step.QUICK),
            decode.decode_cell("small", decode.QUICK),
            search.search_cell("soft", search.QUICK, "small-"),
            search.search_cell("sampled", search.QUICK, "small-"),
            compiled.QUICK,
            *wrap.CELLS,
        ]
    return [
        *equality.CELLS,
        *layer.CELLS,
        *([layer.layer_cell(layer.ON_CUDA)] if cuda else []),
        *ranks.CELLS,
        *step.CELLS,
        *decode.CELLS,
        *search.CELLS,
        *choice.CELLS,
        *compiled.CELLS,
        *wrap.CELLS,
        *whole.CELLS,
    ]


def chosen(cells: Sequence[Cell], names: Sequence[str]) -> list[Cell]:
    """The cells of the given kinds or full names; all if none is given.

    Raises:
        GuilomoError: a name fits no cell.
    """
    kinds = {cell.kind for cell in cells}
    for name in names:
        kind = name.partition("/")[0]
        if kind not in kinds:
            raise unknown("--only", name, kinds)
        known = {kind} | {cell.name for cell in cells if cell.kind == kind}
        if name not in known:
            raise unknown("--only", name, known)
    return [cell for cell in cells if not names or cell.kind in names or cell.name in names]
