"""The terminal that all commands print to."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

console = Console(soft_wrap=True)


def print_table(table: Table, shorter: Table | None = None) -> None:
    """A table whose columns are not cut: a narrow terminal gets the shorter one, a file the whole width."""
    wide = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    if console.is_terminal and wide > console.width:
        console.print(shorter or table)
    else:
        Console(file=console.file, width=max(wide, console.width)).print(table)
