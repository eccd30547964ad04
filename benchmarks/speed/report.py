"""A run in plain text: the targets and the ratios of every cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.speed.targets import TARGETS, Reading, by_name


def printed(results: Mapping[str, Any]) -> str:
    cells = by_name(results["cells"])
    lines = []
    for target in TARGETS:
        verdict, readings = target.verdict(cells)
        lines.append(f"{target.number:2} {verdict:12} {target.what}: {target.wanted}")
        lines += [f"      {reading.label}: {shown(reading)}" for reading in readings]
    for cell in results["cells"]:
        lines.append(cell["name"] + (f": {cell['error']}" if "error" in cell else ""))
        lines += [f"      {what}: {_ratios(timing)}" for what, timing in cell.get("times", {}).items()]
    return "\n".join(lines)


def shown(reading: Reading) -> str:
    """A value with its interval, or why there is none."""
    if reading.value is None or reading.value == float("inf"):
        return reading.why
    if reading.low is None or reading.high is None:
        return f"{reading.value:.4g}"
    noisy = ", noisy" if reading.noisy else ""
    return f"{reading.value:.3f} [{reading.low:.3f}, {reading.high:.3f}]{noisy}"


def _ratios(timing: Mapping[str, Any]) -> str:
    found = ", ".join(f"{name} {r['median']:.2f}" for name, r in timing["ratios"].items())
    discarded = f"{timing['discarded']} of {timing['discarded'] + timing['rounds']} rounds discarded"
    return f"{found} × {timing['reference']} ({discarded}{', noisy' if timing['noisy'] else ''})"
