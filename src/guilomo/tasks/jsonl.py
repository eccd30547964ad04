"""Text and JSON-lines files, plain or compressed, with complaints that name the file and the line."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import GuilomoError, invalid

# A byte-order mark, which some editors write, is skipped rather than refused.
ENCODING = "utf-8-sig"


def open_text(path: Path) -> IO[str]:
    """Opens a text file; `.gz` and `.xz` are decompressed on the way.

    Raises:
        GuilomoError: there is no such file.
    """
    if not path.is_file():
        near = sorted(item.name for item in path.parent.glob("*") if item.is_file())[:20]
        remedy = f"{path.parent} holds: {', '.join(near)}" if near else f"There is nothing in {path.parent}."
        raise invalid("file", str(path), "an existing file", remedy)
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=ENCODING)
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding=ENCODING)
    return open(path, encoding=ENCODING)


def read_text(path: Path) -> str:
    """The whole text of a file.

    Raises:
        GuilomoError: the file is missing, empty, damaged or not UTF-8.
    """
    with open_text(path) as stream:
        try:
            text = stream.read()
        except UnicodeDecodeError as error:
            raise _mis_encoded(path, error) from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise _damaged(path, error) from error
    if not text.strip():
        raise invalid("file", str(path), "a file with some text in it", "It is empty.")
    return text


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields `("file, line n", object)` for each line that is not blank.

    Raises:
        GuilomoError: the file is missing, damaged or not UTF-8, or a line is not a JSON object.
    """
    number = 0
    with open_text(path) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _decode(line, where)
        except UnicodeDecodeError as error:
            raise _mis_encoded(path, error, number + 1) from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise _damaged(path, error) from error


def _decode(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        shown = line.strip()[:80]
        remedy = f"{error.msg} at column {error.colno}. Write one complete JSON object per line."
        raise invalid(where, shown, "a JSON object", remedy) from error
    if not isinstance(value, dict):
        raise invalid(where, line.strip()[:80], "a JSON object in braces")
    return value


def _mis_encoded(path: Path, error: UnicodeDecodeError, line: int | None = None) -> GuilomoError:
    place = "" if line is None else f" at or after line {line}"
    return GuilomoError(
        f"{path} is not UTF-8 text{place} (byte 0x{error.object[error.start]:02x}: {error.reason}). "
        "Convert it, for example: iconv -f latin1 -t utf-8"
    )


def _damaged(path: Path, error: Exception) -> GuilomoError:
    return GuilomoError(f"{path} cannot be decompressed or read: {error}. Fetch or write the file again.")
