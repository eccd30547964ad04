"""Results are for everyone, so they name no place on the machine that made them."""

from __future__ import annotations

import re


def absolute_paths(text: str) -> list[str]:
    """Every path from the root of a file system, wherever a word may begin."""
    return re.findall(r"(?:^|[\s\"'=:(,])(/[\w.-]+/[\w./-]*)", text)
