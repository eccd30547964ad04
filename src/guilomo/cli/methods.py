"""`guilomo methods`: what there is to choose from."""

from __future__ import annotations

import argparse
import json

from rich.table import Table

from guilomo.cli.screen import console, print_table
from guilomo.methods import METHODS, Method, method_named


def list_methods(arguments: argparse.Namespace) -> None:
    chosen = [method_named(name) for name in arguments.names] or list(METHODS.values())
    if arguments.json:
        print(json.dumps([method.to_dict() for method in chosen], indent=2, ensure_ascii=False))
    elif arguments.names:
        for method in chosen:
            _print_whole(method)
    else:
        print_table(_table(chosen))
        console.print("\nguilomo methods NAME tells more, and how to try it.", highlight=False)


def _table(chosen: list[Method]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("method", "what it does", "paper", "a budget buys", "maturity"):
        table.add_column(column)
    for method in chosen:
        table.add_row(method.name, method.summary, method.paper or "ours", method.knobs, method.maturity)
    return table


def _print_whole(method: Method) -> None:
    lines = [
        f"{method.name}: {method.label}",
        f"  {method.summary}",
        f"  paper          {method.paper or 'ours'}",
        f"  a budget buys  {method.knobs}",
        f"  maturity       {method.maturity}" + (f": {method.note}" if method.note else ""),
        f"  mixture        {method.mixture}" if method.mixture else "",
        f"  try it         {method.how_to_try}",
    ]
    console.print("\n".join(line for line in lines if line), highlight=False, markup=False, soft_wrap=True)
