"""Writes that fail: the run says which, what space there is and what to do, and continues once there is room."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from guilomo.cli import main
from guilomo.errors import GuilomoError
from guilomo.files import load_state
from guilomo.run.files import read_json, write_json
from tiny_runs import run_of, without_times, write_recipe

EVERY_STEP: dict[str, Any] = {"search": {"checkpoint_every": 1}, "train": {"save_every": 1}, "methods": ["guilomo"]}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_OF_SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_at(original: Callable[..., Any], count: int, error: Exception) -> Callable[..., Any]:
    """Writes half of the file at the `count`-th call, and fails."""
    calls = 0

    def call(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = original(tensors, path, *args, **kwargs)
        if calls == count:
            os.truncate(path, Path(path).stat().st_size // 2)
            raise error
        return found

    return call


WRITES = {
    "search": ("guilomo.files.state.save_file", 3, "search.safetensors", FULL_OF_SAFETENSORS),
    "training": ("guilomo.files.state.save_file", 9, "training.safetensors", FULL),
    "adapter": ("peft.peft_model.safe_save_file", 1, "adapter", FULL_OF_SAFETENSORS),
}


@pytest.mark.parametrize("case", WRITES)
def test_a_full_disk(
    case: str,
    colour_recipe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place, count, name, error = WRITES[case]
    whole = run_of(colour_recipe("whole", **EVERY_STEP)).all()
    content = colour_recipe("full", **EVERY_STEP)
    command = ["run", str(write_recipe(tmp_path / "recipe.yaml", content)), "--quiet", "--resume"]
    folder, function = place.rsplit(".", 1)
    original = getattr(__import__(folder, fromlist=[function]), function)
    with monkeypatch.context() as patch:
        patch.setattr(place, full_at(original, count, error))
        assert main(command) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.startswith("error: ")
    for said in (f"{name} could not be written", "No space left", "it needs", "are free in", "Free some space"):
        assert said in printed
    output = Path(content["output"])
    assert list(output.rglob("*.unfinished")) == []
    if case != "adapter":
        before = {"search": 2, "training": 2}[case]
        facts = load_state(next(output.rglob(name)))[1]
        assert (facts["step"] if case == "search" else facts["state"]["global_step"]) == before
    assert main(command) == 0
    assert without_times(read_json(output / "results.json"))["methods"] == without_times(whole)["methods"]


def test_a_full_disk_keeps_the_results_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})

    def full(number: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GuilomoError, match=r"results\.json could not be written .*needs [\d,]+ bytes"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GuilomoError, match=r"results\.json could not be written .*--set output"):
        write_json(tmp_path / "file" / "run" / "results.json", {})
