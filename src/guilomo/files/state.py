"""State that a stopped run continues from: one safetensors file of tensors and JSON facts, with a checksum."""

from __future__ import annotations

import json
import reprlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.files.atomic import replacing


class _Part(dict[str, Any]):
    """Contents of a checkpoint by name; a missing one makes the checkpoint unusable."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise _unusable(self.path, f"it lacks {name!r}")


def save_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Replaces the file by one with these tensors and JSON facts; see `replacing` for what survives a crash.

    Raises:
        GuilomoError: the file cannot be written.
    """
    # Few large tensors: safetensors takes some 40 us for each. Views share memory, which it refuses.
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(facts)
    metadata = {"facts": text, "crc32": _checksum(held, text)}
    with replacing(path, sum(t.nbytes for t in held.values()) + len(text)) as unfinished:
        save_file(held, unfinished, metadata=metadata)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `save_state` wrote. Asking the result for a name that it lacks raises `GuilomoError` too.

    Raises:
        GuilomoError: the file is no safetensors file, is truncated or altered, or holds values that are not finite.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        facts = json.loads(metadata["facts"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise _unusable(path, str(error)) from error
    if metadata.get("crc32") != _checksum(tensors, metadata["facts"]):
        raise _unusable(path, "its content does not match its checksum")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise _unusable(path, f"{name!r} holds values that are not finite")
    return _Part(path, tensors), _Part(path, facts)


def refuse_other(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Refuses to continue a checkpoint under settings other than those it was made with.

    Raises:
        GuilomoError: names the settings that differ, with both values.
    """
    different = [k for k in present if saved.get(k) != present[k]]
    if different:
        shown = ", ".join(f"{k}: {_short(saved.get(k))} then, {_short(present[k])} now" for k in different[:4])
        raise GuilomoError(
            f"{path} was made with other settings ({shown}). Use the same settings to continue it, or another "
            "output folder to start anew."
        )


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector on the device of the first; dtypes are promoted, which loses nothing."""
    if not tensors:
        return torch.zeros(0)
    return torch.cat([t.detach().reshape(-1).to(tensors[0].device) for t in tensors])


def unflat(vector: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Back from `flat`, as copies."""
    parts = vector.split([shape.numel() for shape in shapes])
    return [part.clone().view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    """CRC-32 of names, types, shapes and contents: finds every single flipped bit, and is there for accidents only."""
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content, value)
    return f"{value:08x}"


def _short(value: Any) -> str:
    """A whole allocation would bury the message."""
    return reprlib.repr(value)


def _unusable(path: Path, reason: str) -> GuilomoError:
    return GuilomoError(
        f"{path} is not a usable checkpoint ({reason}). Delete it to start this stage again from its beginning."
    )
