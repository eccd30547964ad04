"""Kills a copy of this process with SIGKILL at a chosen moment of its work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class Moment(NamedTuple):
    """When to die.

    Attributes:
        what: "step" (an update of the weights), or the name of a file or folder that is put in its place.
        count: at which one.
        when: "before" or "after" it; "half": a file is cut to half of what was written, and never put in its place.
    """

    what: str
    count: int
    when: str

    def __str__(self) -> str:
        return "-".join(map(str, self))


def killed(work: Callable[[], Any], moment: Moment, steps: Path) -> None:
    """Does the work in a forked process until the moment comes; `steps` grows by one byte per update."""
    child = os.fork()
    if child == 0:
        try:
            _arm(moment)
            count_steps(steps)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the work ended before {moment}"
    assert os.WTERMSIG(status) == signal.SIGKILL


def count_steps(log: Path, patch: Any = setattr) -> None:
    """Adds a byte to the log at every update of the weights."""
    original = torch.optim.AdamW.step

    def step(*args: Any, **kwargs: Any) -> Any:
        with log.open("ab") as file:
            file.write(b".")
        return original(*args, **kwargs)

    patch(torch.optim.AdamW, "step", step)


def _arm(moment: Moment) -> None:
    if moment.what == "step":
        torch.optim.AdamW.step = _dying(torch.optim.AdamW.step, moment, lambda args: True)  # type: ignore[method-assign]
    else:
        os.replace = _dying(os.replace, moment, lambda args: Path(args[1]).name == moment.what)


def _dying(original: Callable[..., Any], moment: Moment, counts: Callable[[Any], bool]) -> Callable[..., Any]:
    seen = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += counts(args)
        due = counts(args) and seen == moment.count
        if due and moment.when == "half":
            _cut(Path(args[0]))
        if due and moment.when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        found = original(*args, **kwargs)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return call


def _cut(written: Path) -> None:
    file = written / "adapter_model.safetensors" if written.is_dir() else written
    os.truncate(file, file.stat().st_size // 2)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system lacks")
