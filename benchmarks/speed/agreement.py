"""Whether two runs on one machine say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compared:
    """One ratio in two runs.

    Attributes:
        name: cell, what was timed, variant. first, again: median and interval, as text.
        within: the second median lies in the first interval. agrees: the two intervals overlap, which two honest runs
            miss far more seldom. noisy: a run says so itself.
    """

    name: str
    first: str
    again: str
    within: bool
    agrees: bool
    noisy: bool


def compare(first: Sequence[Mapping[str, Any]], again: Sequence[Mapping[str, Any]]) -> list[Compared]:
    """All ratios that both runs have."""
    others = {cell["name"]: cell for cell in again}
    return [
        compared
        for cell in first
        for what, timing in cell.get("times", {}).items()
        for compared in _of_timing(f"{cell['name']}, {what}", timing, _same(others, cell["name"], what))
    ]


def _same(cells: Mapping[str, Any], name: str, what: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = cells.get(name, {}).get("times", {}).get(what)
    return found


def _of_timing(name: str, first: Mapping[str, Any], again: Mapping[str, Any] | None) -> list[Compared]:
    if again is None:
        return []
    noisy = first["noisy"] or again["noisy"]
    return [
        Compared(
            name=f"{name}, {variant}",
            first=_text(a),
            again=_text(b),
            within=a["low"] <= b["median"] <= a["high"],
            agrees=a["low"] <= b["high"] and b["low"] <= a["high"],
            noisy=noisy,
        )
        for variant, a in first["ratios"].items()
        if variant != first["reference"] and (b := again["ratios"].get(variant)) is not None
    ]


def _text(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
