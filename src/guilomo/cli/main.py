"""Dispatch, and what every command shares: exit codes and error messages."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from transformers.utils import logging

from guilomo.cli import commands
from guilomo.cli.parser import build_parser
from guilomo.errors import GuilomoError
from guilomo.training import Interrupted

OK, BAD_INPUT, STOPPED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    # Bars and notes of the libraries underneath would be drawn over ours.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    arguments.typed = " ".join(["guilomo", *(sys.argv[1:] if argv is None else argv)])
    errors = Console(stderr=True, soft_wrap=True)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, errors)
            # PEFT 0.21.2 reads an attribute that transformers 5.23 has renamed, each time an adapter is attached.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return _dispatch(arguments)
    except GuilomoError as error:
        errors.print(f"[bold red]error[/]: {_plain(str(error))}", highlight=False)
        return BAD_INPUT
    except OSError as error:
        errors.print(
            f"[bold red]error[/]: {_plain(str(error))}. Check the path, the rights and the space.", highlight=False
        )
        return BAD_INPUT
    except Interrupted as stop:
        errors.print(f"{_plain(str(stop))} Continue with the same command and --resume.", highlight=False)
        return STOPPED
    except KeyboardInterrupt:
        errors.print("Stopped at once; continue from the last checkpoint with --resume.")
        return STOPPED


def _dispatch(arguments: argparse.Namespace) -> int:
    getattr(commands, arguments.command)(arguments)
    return OK


def _show_warning(errors: Console, message: Warning | str, *place: Any) -> None:
    """The message of a warning without the line of code that gave it."""
    errors.print(f"[yellow]warning[/]: {_plain(str(message))}", highlight=False)


def _plain(text: str) -> str:
    """Square brackets are markup to rich."""
    return text.replace("[", r"\[")
