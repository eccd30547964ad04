"""What a result rests on: versions, hardware, time."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Python and the packages that shape the numbers."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerator."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {"cpu": _processor(), "cores": os.cpu_count(), "memory_gib": round(pages / 2**30, 1), "gpu": gpu}


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
