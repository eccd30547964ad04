"""The colours and type of every picture: one accent, greys and one warning hue, for light and dark."""

from __future__ import annotations

import matplotlib
from matplotlib import font_manager

#: Figures are drawn with the light values; in the page each value is swapped for its CSS variable,
#: so the same picture follows the reader's colour scheme. No two names may share a value.
LIGHT: dict[str, str] = {
    "paper": "#fdfcf9",
    "ink": "#1f2426",
    "muted": "#5c6568",
    "line": "#d9dcda",
    "quiet": "#8b9497",
    "accent": "#0d6570",
    "on-accent": "#fefefe",
    "on-middle": "#11191a",
    "warn": "#a8401c",
}

DARK: dict[str, str] = {
    "paper": "#14181a",
    "ink": "#e7eaea",
    "muted": "#a3adb0",
    "line": "#353c3f",
    "quiet": "#7f8a8d",
    "accent": "#63c5cd",
    "on-accent": "#0c1617",
    "on-middle": "#0c1617",
    "warn": "#f29871",
}

DEPTH_STEPS = 8
FACES = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")


def _mix(start: str, end: str, share: float) -> str:
    """The colour `share` of the way from `start` to `end`, mixed in plain RGB."""
    pairs = zip(bytes.fromhex(start[1:]), bytes.fromhex(end[1:]), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _ramp(start: str, end: str) -> dict[str, str]:
    """Names `depth-0` (first layers) to `depth-7` (last layers), evenly spaced."""
    return {f"depth-{i}": _mix(start, end, i / (DEPTH_STEPS - 1)) for i in range(DEPTH_STEPS)}


LIGHT |= _ramp("#bccaca", "#073f47")
DARK |= _ramp("#45565a", "#a9eef2")

INK, MUTED, LINE, QUIET = LIGHT["ink"], LIGHT["muted"], LIGHT["line"], LIGHT["quiet"]
ACCENT, WARN, PAPER = LIGHT["accent"], LIGHT["warn"], LIGHT["paper"]


def depth_colour(position: int, total: int) -> str:
    """The colour of layer `position` out of `total`: pale at the input, dark at the output."""
    step = round(position / max(total - 1, 1) * (DEPTH_STEPS - 1))
    return LIGHT[f"depth-{step}"]


def _installed_faces() -> list[str]:
    """The preferred faces this machine has; asking for others would make matplotlib warn."""
    known = set(font_manager.get_font_names())
    return [face for face in FACES if face in known] or ["DejaVu Sans"]


#: Decorator and context manager: everything drawn inside has the house style, nothing outside changes.
house_style = matplotlib.rc_context(
    {
        "font.family": _installed_faces(),
        "font.size": 9.0,
        "svg.fonttype": "none",
        # A dollar sign in a run or module name is a dollar sign.
        "text.parse_math": False,
        "svg.hashsalt": "guilomo",
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": LINE,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "hatch.linewidth": 0.7,
        "lines.solid_capstyle": "round",
        "axes.unicode_minus": True,
    }
)
