"""The lines in an adapter's README that tell another process how to load it."""

from __future__ import annotations

from pathlib import Path

_MARK = "<!-- guilomo: how to load -->"


def loading_section(base_model: str | None) -> str:
    """Markdown: PEFT finds the adapter's type only after ``import guilomo``."""
    base = base_model or "BASE_MODEL"
    return f"""
{_MARK}
## How to load this adapter

It is a mixture of LoRA experts. PEFT knows this adapter type once `guilomo` is imported:

```python
import guilomo, peft  # pip install guilomo
model = peft.PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

where `base_model` is `{base}` loaded with transformers.
"""


def add_loading_section(folder: Path, base_model: str | None) -> None:
    """Adds the section to ``README.md`` of an adapter folder, or of its parent when the card lies there."""
    card = folder / "README.md"
    if not card.exists() and (folder.parent / "README.md").exists():
        card = folder.parent / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if _MARK not in text:
        card.write_text(text.rstrip("\n") + "\n" + loading_section(base_model), encoding="utf-8")
