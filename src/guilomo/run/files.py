"""Files of a run: written whole or not at all, so that what exists can be trusted on resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from guilomo.errors import GuilomoError
from guilomo.files import replacing


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step; seldom enough to survive power cuts too.

    Raises:
        GuilomoError: it cannot be written.
    """
    content = text.encode()
    with replacing(path, len(content)) as unfinished, open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
