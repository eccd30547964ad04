"""Replaces a file in one step, and explains why a write failed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from guilomo.errors import GuilomoError


@contextmanager
def replacing(path: Path, size: int) -> Iterator[Path]:
    """The name to write to; what lies there when the block ends takes the place of `path`.

    A process killed at any moment leaves the old file or the new one: the data are in the system's hands before the
    rename. Only a power cut could still lose them. Surviving that takes an fsync, which can cost more than a training
    step, so it is left to callers who write seldom.

    Args:
        path: the file to write; its folder is made.
        size: bytes it will have, for the message when they do not fit.

    Raises:
        GuilomoError: the file cannot be written; names the path, the space needed and left, and the remedy.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with explained(path, size):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield unfinished
            os.replace(unfinished, path)
        except BaseException:
            # Half a file would take up the space that a full disk lacks.
            unfinished.unlink(missing_ok=True)
            raise


@contextmanager
def explained(path: Path, size: int) -> Iterator[None]:
    """Turns a failed write of `size` bytes to `path` into an error that says what to do.

    Raises:
        GuilomoError: see above.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = next(part for part in path.absolute().parents if part.is_dir())
        raise GuilomoError(
            f"{path} could not be written ({error}): it needs {_bytes(size)} and "
            f"{_bytes(shutil.disk_usage(folder).free)} are free in {folder}. What was saved before is intact. "
            "Free some space or make the folder writable and continue with --resume, or give another output folder "
            "(--set output=...)."
        ) from error


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size:,} bytes"
