"""`guilomo methods`: what there is to choose from."""

from __future__ import annotations

import argparse
import json

from rich.table import Table

from guilomo.cli.screen import console, print_table
from guilomo.errors import GuilomoError, invalid
from guilomo.methods import METHODS, Method, method_named
from guilomo.run.method_recipe import method_recipe


def list_methods(arguments: argparse.Namespace) -> None:
    if arguments.recipe:
        _print_recipe(arguments)
        return
    chosen = [method_named(name) for name in arguments.names] or list(METHODS.values())
    if arguments.json:
        print(json.dumps([method.to_dict() for method in chosen], indent=2, ensure_ascii=False))
    elif arguments.names:
        for method in chosen:
            _print_whole(method)
    else:
        print_table(_table(chosen))
        console.print(
            "\nguilomo methods NAME tells more, and how to try it; with --recipe it prints a recipe.", highlight=False
        )


def _table(chosen: list[Method]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("method", "what it does", "paper", "a budget buys", "maturity"):
        table.add_column(column)
    for method in chosen:
        table.add_row(method.name, method.summary, method.paper or "ours", method.knobs, method.maturity)
    return table


def _print_recipe(arguments: argparse.Namespace) -> None:
    if arguments.json:
        raise GuilomoError("--recipe prints YAML and --json prints JSON. Leave one of them out.")
    if len(arguments.names) != 1:
        raise invalid("--recipe", " ".join(arguments.names), "one method", "Try: guilomo methods ld_mole --recipe")
    print(method_recipe(arguments.names[0]), end="")


def _print_whole(method: Method) -> None:
    lines = [
        f"{method.name}: {method.label}",
        f"  {method.summary}",
        *(f"  {key:<13}  {value}" for key, value in method.facts.items()),
        f"  mixture        {method.mixture}" if method.mixture else "",
        f"  several tasks  {method.mixture_for(2)}, of two trained as one (task.parts)" if method.mixed else "",
        f"  try it         {method.how_to_try}",
    ]
    console.print("\n".join(line for line in lines if line), highlight=False, markup=False, soft_wrap=True)
