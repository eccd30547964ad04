"""Files of a run: written whole or not at all, so that what exists can be trusted on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from guilomo.errors import GuilomoError


def write_text(path: Path, text: str) -> None:
    """Writes beside the target and renames, so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        GuilomoError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GuilomoError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GuilomoError(f"{path} is damaged ({error}). Delete it to have it made again.") from None
