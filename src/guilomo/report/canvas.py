"""Drawing surfaces measured in CSS pixels, so a label of 12 is 12 pixels in the page and in the PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from guilomo.errors import invalid
from guilomo.report.palette import INK, LINE, MUTED, PAPER, house_style

PIXELS_PER_INCH = 96
POINTS_PER_PIXEL = 0.75
#: Widths of the two renderings in the page: the desktop column and a 390 px phone less its margins.
WIDE, HALF, NARROW = 920, 444, 354
#: Below this width a picture stacks what it would otherwise set side by side.
PHONE = 480
FORMATS = (".png", ".svg", ".pdf")


def points(pixels: float) -> float:
    """CSS pixels as typographic points, matplotlib's unit for type and lines."""
    return pixels * POINTS_PER_PIXEL


def canvas(width: float, height: float) -> Figure:
    """An empty transparent figure of `width` x `height` pixels."""
    figure = Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)
    figure.set_facecolor("none")
    return figure


def size(figure: Figure) -> tuple[float, float]:
    """Width and height of a figure in pixels."""
    width, height = figure.get_size_inches()
    return width * PIXELS_PER_INCH, height * PIXELS_PER_INCH


def panel(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels; `y` counts downwards from the top edge."""
    total_width, total_height = size(figure)
    bottom = 1 - (y + height) / total_height
    axes = figure.add_axes((x / total_width, bottom, width / total_width, height / total_height))
    axes.set_facecolor("none")
    return axes


def words(figure: Figure, x: float, y: float, text: str, pixels: float = 12, **style: Any) -> None:
    """One line of text with its baseline at (`x`, `y`) in pixels from the top left corner."""
    total_width, total_height = size(figure)
    style = {"color": INK, "ha": "left", "va": "baseline"} | style
    figure.text(x / total_width, 1 - y / total_height, text, fontsize=points(pixels), **style)


def plain(axes: Axes) -> Axes:
    """Axes without frame and ticks, for pictures that bring their own labels."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return axes


def quiet(axes: Axes, pixels: float = 11, ticks: int = 4) -> Axes:
    """Axes for curves: a base line, hair lines to read values off, few ticks."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=points(pixels), labelcolor=MUTED, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(ticks))
    return axes


@house_style
def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a picture on an opaque background, at twice the screen resolution for PNG.

    Args:
        figure: what any `plot_` function returned.
        path: the file; its ending chooses the format: .png, .svg or .pdf.
    """
    target = Path(path)
    if target.suffix not in FORMATS:
        raise invalid("path", str(path), "a file ending in one of " + ", ".join(FORMATS))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=2 * PIXELS_PER_INCH, facecolor=PAPER)
    return target
