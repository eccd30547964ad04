"""What tells one adapter from another of the same name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from guilomo.adapters.lora import CONFIG
from guilomo.files.adapter import WEIGHTS


def digest_of(folder: Path) -> str | None:
    """sha256 over the bytes of an adapter's configuration and weights, wherever it lies; None where one is missing."""
    files = [folder / CONFIG, folder / WEIGHTS]
    if not all(file.is_file() for file in files):
        return None
    parts = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(parts).hexdigest()
