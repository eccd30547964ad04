"""Where a module stands in a picture: its layer is the row, its projection the column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from guilomo.allocation.names import layers_of, site

#: A column narrower than this many pixels breaks its name at underscores too.
_NARROW_COLUMN = 62


@dataclass(frozen=True)
class Grid:
    """The modules of a model laid out as layer x projection.

    Attributes:
        rows: layer labels, first layer first.
        columns: projection names, shortened as far as they stay distinct.
        places: module name -> (row, column).
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    places: dict[str, tuple[int, int]]

    def headings(self, column_width: float) -> list[str]:
        """Column names broken into lines that fit the column, all of equal height."""
        stacked = [_stacked(name, column_width).split("\n") for name in self.columns]
        height = max((len(lines) for lines in stacked), default=1)
        return ["\n".join([*[""] * (height - len(lines)), *lines]) for lines in stacked]


def grid_of(names: Iterable[str]) -> Grid:
    """Lays out modules by their dotted names; columns keep the order in which they first appear."""
    names = list(names)
    layer_of = layers_of(names)
    projections = list(dict.fromkeys(site(name)[1] for name in names))
    keys = {layer_of[name]: site(name)[0] for name in names}
    places = {name: (layer_of[name], projections.index(site(name)[1])) for name in names}
    return Grid(_row_labels([keys[i] for i in sorted(keys)]), short_names(projections), places)


def _row_labels(keys: Sequence[str | None]) -> tuple[str, ...]:
    """The layer number; with the initial of its stack where a model has several (`e3`, `d3`)."""
    stacks = {key.rpartition(".")[0] for key in keys if key}
    lead = (lambda key: key[:1]) if len(stacks) > 1 else (lambda key: "")
    return tuple(lead(key) + key.rpartition(".")[2] if key else "\N{EN DASH}" for key in keys)


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The shortest ends of dotted names that stay distinct: `attention.self.query` becomes `query`."""
    return tuple(_short(name, [other for other in names if other != name]) for name in names)


def _short(name: str, others: Sequence[str]) -> str:
    parts = name.split(".")
    for length in range(1, len(parts)):
        tail = parts[-length:]
        if all(other.split(".")[-length:] != tail for other in others):
            return ".".join(tail)
    return name


def _stacked(name: str, column_width: float) -> str:
    """A name with one component per line; long components break at underscores in narrow columns."""
    lines = name.split(".")
    if column_width >= _NARROW_COLUMN:
        return "\n".join(lines)
    lines = [piece for line in lines for piece in line.replace("_", "_\n").split("\n")]
    return "\n".join(_hyphenated(line, column_width) for line in lines)


def _hyphenated(word: str, column_width: float) -> str:
    """A word in two halves if it is wider than its column; 5.5 pixels is a letter at the smallest size."""
    half = (len(word) + 1) // 2
    return f"{word[:half]}-\n{word[half:]}" if len(word) * 5.5 > column_width else word
