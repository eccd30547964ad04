"""A bank: a folder of adapter folders, and what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guilomo.adapters.lora import CONFIG, read_adapter
from guilomo.errors import GuilomoError, invalid


def adapters_in(folder: str | Path) -> dict[str, Path]:
    """The adapter folders directly inside a folder by their names, in alphabetical order.

    A PeftModel with several adapters saves such a folder.

    Raises:
        GuilomoError: there is no such folder, or no adapter in it.
    """
    folder = Path(folder)
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))}
    if not found:
        raise invalid("bank", str(folder), f"a folder whose subfolders hold {CONFIG}", "Put one adapter into each.")
    return found


def describe(folder: Path, name: str) -> dict[str, Any]:
    """What an adapter is and whether it can become an expert; JSON-ready.

    Returns:
        name, folder, kind (PEFT's type), base (its base model's name), experts (names, for mixtures); and for plain
        LoRA: modules (their number), ranks (the different ones), scales (lowest and highest), parameters. `problem`
        says why it cannot become an expert, and is None where it can.
    """
    content = _content(folder / CONFIG)
    found: dict[str, Any] = {
        "name": name,
        "folder": str(folder),
        "kind": content.get("peft_type"),
        "base": content.get("base_model_name_or_path"),
        "experts": content.get("expert_names"),
        "problem": None,
    }
    try:
        adapter = read_adapter(folder, name)
    except GuilomoError as error:
        return {**found, "problem": str(error)}
    scales = [pair.scale for pair in adapter.pairs.values()]
    return {
        **found,
        "modules": len(adapter.pairs),
        "ranks": sorted({pair.rank for pair in adapter.pairs.values()}),
        "scales": [min(scales), max(scales)],
        "parameters": adapter.parameters,
    }


def _content(path: Path) -> dict[str, Any]:
    """The configuration as far as it can be read; what is wrong with it is said by `read_adapter`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
