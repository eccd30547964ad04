"""Writes adapter folders of PEFT whole, and checks their weights before anything loads them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from guilomo.errors import GuilomoError
from guilomo.files.atomic import explained

WEIGHTS, CHECKSUM = "adapter_model.safetensors", "adapter_model.safetensors.sha256"
"""The checksum file is in the form of ``sha256sum``, which can check it too."""


def save_adapter(
    model: PeftModel, folder: Path, write: Callable[[PeftModel, str], None] = PeftModel.save_pretrained
) -> None:
    """Writes the adapter with its checksum; the folder appears whole or not at all.

    Args:
        write: puts the adapter's files into a folder; unset: as PEFT does.

    Raises:
        GuilomoError: it cannot be written.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    with explained(folder, sum(p.nbytes for p in model.parameters() if p.requires_grad)):
        try:
            write(model, str(unfinished))
            write_checksum(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def write_checksum(folder: Path) -> None:
    """Writes the checksum of the folder's weights beside them; without weights it does nothing."""
    if (folder / WEIGHTS).is_file():
        (folder / CHECKSUM).write_text(f"{_sha256(folder / WEIGHTS)}  {WEIGHTS}\n", encoding="utf-8")


def check_adapter(folder: Path) -> None:
    """Refuses weights that are missing, pickled, damaged, altered since they were saved, or not finite.

    Raises:
        GuilomoError: names the file, what is wrong with it, and the tensor where it is one.
    """
    refuse_pickle(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        # PEFT would look for a model of this name on the Hub.
        raise GuilomoError(f"{path} is missing: the folder has a configuration but no weights. {_again()}")
    try:
        with safe_open(str(path), framework="pt") as file:
            bad = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    except SafetensorError as error:
        raise GuilomoError(f"{path} is damaged or no safetensors file ({error}). {_again()}") from error
    check_checksum(folder)
    if bad:
        raise GuilomoError(f"{path}: {bad[0]!r} holds values that are not finite. {_again()}")


def check_checksum(folder: Path) -> None:
    """Compares the weights with the checksum that was saved with them; does nothing where either is absent.

    Raises:
        GuilomoError: they differ.
    """
    path, noted = folder / WEIGHTS, folder / CHECKSUM
    if not path.is_file() or not noted.is_file():
        return
    if noted.read_text(encoding="utf-8", errors="replace").split()[:1] != [_sha256(path)]:
        raise GuilomoError(
            f"{path} is damaged: it does not match {CHECKSUM}. {_again()} If the weights were changed on purpose, "
            f"delete {noted}."
        )


def refuse_pickle(folder: Path) -> None:
    """Refuses weights in the form of older versions of PEFT, which loading would unpickle.

    Raises:
        GuilomoError: the folder has such weights and no others.
    """
    pickled = folder / "adapter_model.bin"
    if pickled.is_file() and not (folder / WEIGHTS).is_file():
        raise GuilomoError(
            f"{pickled} is a pickle, which can run any code when it is read: expected {WEIGHTS}. Where you trust the "
            "file, load it with PEFT and save it again (model.save_pretrained)."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _again() -> str:
    return "Copy the whole adapter folder again, or train it again with guilomo train."
