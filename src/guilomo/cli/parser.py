"""The command line's grammar."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from guilomo import __version__
from guilomo.adapters import WAYS
from guilomo.cli.options import describe_options
from guilomo.compare import CompareConfig
from guilomo.export.words import FORMS
from guilomo.layers.routers import ROUTERS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

RECIPE_HELP = "YAML file; see recipes/. Without one, defaults (the packaged demo task and model)"

EPILOG = """exit codes: 0 done; 1 an unexpected failure: a bug, please report it;
2 bad arguments, recipe or data (the message says what to change);
130 stopped by Ctrl-C after saving (continue with --resume)."""


def build_parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    parser = argparse.ArgumentParser(
        prog="guilomo",
        description="Mixtures of LoRA experts whose expert counts and ranks are searched under a parameter budget.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"guilomo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _run(commands)
    _compare(commands)
    _search(commands)
    _allocate(commands)
    _train(commands)
    _evaluate(commands)
    _export(commands)
    _bank(commands)
    _methods(commands)
    _inspect(commands)
    _report(commands)
    return parser


def _recipe_command(commands: Commands, name: str, help: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"{describe_options()}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("recipe", nargs="?", help=RECIPE_HELP)
    _overridable(command)
    return command


def _overridable(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the file, e.g. --set search.steps=100; may be given several times",
    )
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _resumable(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", action="store_true", help="continue the run in the output folder, if there is one")
    command.add_argument(
        "--dry-run", action="store_true", help="show the plan of every method, costs and estimates; train nothing"
    )


def _run(commands: Commands) -> None:
    command = _recipe_command(commands, "run", "search, train every method at one budget, compare, write the report")
    _resumable(command)


def _compare(commands: Commands) -> None:
    help = "train every method on every task with every seed, at one budget; test and rank them"
    command: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"{describe_options(CompareConfig)}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "file", nargs="?", help="YAML file; docs/compare.md has one. The options below replace its keys"
    )
    command.add_argument("--model", metavar="M", help="minilm, a folder, or a name on the Hub")
    command.add_argument(
        "--tasks",
        metavar="A,B+C",
        help="docstrings, data files, FOLDER/NAME or hub:OWNER/DATASET; those joined by + are trained as one",
    )
    command.add_argument("--methods", metavar="X,Y", help="names of the rows; plain LoRA is added if it is left out")
    command.add_argument("--seeds", metavar="0,1,2", help="one training per task, method and seed")
    command.add_argument("--budget", type=int, metavar="N", help="trainable parameters that every method may use")
    command.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (default 1)")
    command.add_argument(
        "--storage",
        metavar="URL",
        help="database with the queue, for several machines that share the output folder, such as "
        "postgresql://USER@HOST/NAME (default: a file in the output folder)",
    )
    command.add_argument("--join", action="store_true", help="do cells of a comparison that was started elsewhere")
    command.add_argument("--retry-failed", action="store_true", help="continue, and try again the cells that failed")
    command.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    _overridable(command)
    _resumable(command)


def _search(commands: Commands) -> None:
    command = _recipe_command(commands, "search", "only the search: which experts and ranks, for this model and task")
    _resumable(command)


def _allocate(commands: Commands) -> None:
    command = _recipe_command(commands, "allocate", "make an allocation without searching, and show what it costs")
    command.add_argument(
        "--strategy", default="uniform", help="a row of `guilomo methods` that needs no search (default uniform)"
    )
    command.add_argument(
        "--option", dest="options", action="append", default=[], metavar="KEY=VALUE", help="option of the strategy"
    )
    command.add_argument("--save", metavar="FILE", help="write the allocation as JSON")
    command.add_argument("--plot", metavar="FILE", help="write its heat map (.png, .svg or .pdf)")


def _train(commands: Commands) -> None:
    command = _recipe_command(commands, "train", "train and score one method of the recipe with one seed")
    _resumable(command)
    command.add_argument("--method", required=True, help="name of a method of the recipe")
    command.add_argument("--seed", type=int, help="seed of head, data order and dropout (default: the recipe's first)")


def _evaluate(commands: Commands) -> None:
    command = _recipe_command(commands, "evaluate", "score an adapter on the recipe's task, or with lm-eval")
    command.add_argument("--adapter", required=True, metavar="FOLDER", help="adapter folder")
    command.add_argument("--split", default="test", help="train, held_out or test (default test)")
    command.add_argument(
        "--lm-eval", metavar="TASKS", help="comma-separated lm-eval tasks instead of the recipe's task"
    )
    command.add_argument("--include-path", metavar="FOLDER", help="with --lm-eval: folder with task YAML files")
    command.add_argument("--limit", type=int, help="with --lm-eval: only so many examples per task")
    command.add_argument("--json", dest="save", metavar="FILE", help="write the scores as JSON")


EXPORT_TRADE_OFFS = """what each form trades off:
  stacked  exact at the mean gates; the rank is the sum of the experts' ranks, so the file is as large as the mixture
  svd      the nearest change of rank R (--rank); smaller, and loses what the lower ranks held as well
  merged   a whole model with no adapter; exact, but only where gates do not depend on the token (router: fixed, or
           one expert per module)
A plain LoRA has one set of weights for all tokens: where the router chooses experts token by token, that is lost. The
command measures how much, on --split; export.json has every number."""


def _export(commands: Commands) -> None:
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="make plain LoRA or merged weights of a mixture, and measure what that loses",
        description="Makes plain LoRA or merged weights of a mixture, for servers that know no mixtures, and measures "
        "what that loses.",
        epilog=f"{EXPORT_TRADE_OFFS}\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("folder", help="run folder, a method's seed folder in it, or an adapter folder")
    command.add_argument("--to", choices=sorted(FORMS), default="stacked", help="the form (default stacked); see below")
    command.add_argument("--rank", type=int, metavar="R", help="with --to svd: highest rank of a module")
    command.add_argument(
        "--uniform-rank",
        action="store_true",
        help="pad all modules with zeros to one rank, for servers that know one rank per adapter (vLLM); exact, larger",
    )
    command.add_argument("--method", help="with a run folder: which method (needed where several are trained)")
    command.add_argument("--seed", type=int, help="with a run folder: which seed (default: the lowest)")
    command.add_argument("--recipe", metavar="FILE", help="model and data to measure on (default: those of the run)")
    command.add_argument("--split", default="test", help="rows for the loss: test or held_out (default test)")
    command.add_argument(
        "--rows",
        type=int,
        default=1000,
        metavar="N",
        help="at most N training rows for the gates and N rows for the loss (default 1000); more: surer, slower",
    )
    command.add_argument("--output", metavar="DIR", help="folder to write (default: beside the adapter)")
    command.add_argument("--quiet", action="store_true", help="no progress, only the result")


def _bank(commands: Commands) -> None:
    help = "ready-made LoRA adapters: list them, choose some for a task, build a mixture of them"
    actions = commands.add_parser("bank", help=help, description=help[0].upper() + help[1:] + ".").add_subparsers(
        dest="action", required=True, metavar="ACTION"
    )
    listing = actions.add_parser("list", help="what a folder of adapters holds")
    listing.add_argument("folder", help="folder with one adapter per subfolder")
    listing.add_argument("--json", action="store_true", help="print JSON")
    _bank_select(_recipe_command(actions, "select", "choose the adapters that suit the recipe's task"))
    _bank_build(_recipe_command(actions, "build", "make ready-made adapters the experts of one mixture"))


def _bank_select(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bank", required=True, metavar="DIR", help="folder with one adapter per subfolder")
    command.add_argument("--by", default="rocket", help=f"{', '.join(WAYS)} (default rocket)")
    command.add_argument("--count", type=int, default=4, help="how many to choose (default 4)")
    command.add_argument("--k", type=int, default=50, help="labelled examples, of the training rows (default 50)")
    command.add_argument("--pool", type=int, default=8, help="rocket: how many go on to the last round (default 8)")
    command.add_argument("--names", metavar="A,B", help="with --by manual: the adapters to take")
    command.add_argument("--seed", type=int, default=0, help="of the examples and of --by random (default 0)")
    command.add_argument("--save", metavar="FILE", help="write the selection as JSON, for guilomo bank build")
    command.add_argument("--json", action="store_true", help="print it as JSON (with --quiet, nothing else)")


def _bank_build(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bank", metavar="DIR", help="folder with one adapter per subfolder; with --selection, where it has moved to"
    )
    command.add_argument("--names", metavar="A,B", help="the adapters to take, in this order (default: all)")
    command.add_argument("--selection", metavar="FILE", help="take those of guilomo bank select --save FILE instead")
    command.add_argument("--output", required=True, metavar="DIR", help="adapter folder to write")
    command.add_argument("--top-k", type=int, default=2, help="adapters that a token uses (default 2)")
    command.add_argument("--router", default="topk", help=f"{', '.join(sorted(ROUTERS))} (default topk)")
    command.add_argument(
        "--train", default="router", help="router: the adapters stay as they are; all: they are trained too"
    )
    command.add_argument("--saved-from", metavar="NAME", help="whose head to take, where those of the adapters differ")
    command.add_argument("--fit", action="store_true", help="train it on the recipe's task, as its `train` says")
    command.add_argument("--resume", action="store_true", help="continue a --fit that was stopped")


def _methods(commands: Commands) -> None:
    help = "list every method: what it does, its paper, what a budget buys, how to try it"
    command = commands.add_parser("methods", help=help, description=help[0].upper() + help[1:] + ".")
    command.add_argument("names", nargs="*", metavar="NAME", help="only these, in full")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--recipe", action="store_true", help="print a recipe of one method, for guilomo run")


def _inspect(commands: Commands) -> None:
    command = commands.add_parser("inspect", help="show the allocation of an adapter, run or JSON file")
    command.add_argument("path", help="adapter folder, run folder or allocation.json")
    command.add_argument("--diff", metavar="OTHER", help="show how another allocation differs")
    command.add_argument("--plot", metavar="FILE", help="write the heat map (.png, .svg or .pdf)")
    command.add_argument("--json", action="store_true", help="print JSON")


def _report(commands: Commands) -> None:
    command = commands.add_parser("report", help="write report.html of a run folder again, from its results.json")
    command.add_argument("folder", help="run folder")
    command.add_argument("--picture", metavar="FILE", help="also write the headline picture (.png, .svg or .pdf)")
