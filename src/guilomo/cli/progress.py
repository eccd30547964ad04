"""Progress on the terminal: a bar with an ETA where someone watches, a line now and then where nobody does."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from guilomo.run.pipeline import StageProgress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def shown_progress(console: Console, quiet: bool) -> Iterator[StageProgress]:
    """A `StageProgress` that draws on `console`."""
    if quiet:
        yield lambda stage, step, steps, text: None
    elif console.is_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield _lines(console)


@contextmanager
def _bars(console: Console) -> Iterator[StageProgress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", style="dim"),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, object] = {}

        def report(stage: str, step: int, steps: int, text: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=steps, text=text)
            bars.update(tasks[stage], completed=step, total=steps, text=text)  # type: ignore[arg-type]

        yield report


def _lines(console: Console) -> StageProgress:
    begun: dict[str, float] = {}
    shown: dict[str, float] = {}

    def report(stage: str, step: int, steps: int, text: str) -> None:
        now = time.monotonic()
        start = begun.setdefault(stage, now)
        if step < steps and now - shown.get(stage, start) < SECONDS_BETWEEN_LINES:
            return
        shown[stage] = now
        left = (now - start) / max(step, 1) * (steps - step)
        eta = f", {left:.0f} s left" if step < steps else f", {now - start:.0f} s"
        console.print(f"{stage}: {step}/{steps}{eta}{'  ' + text if text else ''}", highlight=False)

    return report


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks the run to save and stop; a second Ctrl-C stops at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nStopping after this step; what is done is kept. Once more to stop at once.", file=sys.stderr)

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
