"""The command line: arguments in, one call, result out."""

from guilomo.cli.main import main

__all__ = ["main"]
