"""A matplotlib figure as inline SVG that follows the page: its colours, its typeface, its ids."""

from __future__ import annotations

import re
from html import escape
from io import StringIO

from matplotlib.figure import Figure

from guilomo.report.palette import LIGHT, house_style

_PROLOGUE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_OPENING = re.compile(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", re.DOTALL)
_ID = re.compile(r"\sid=\"([^\"]*)\"")
_REFERENCE = re.compile(r"(?:href=\"#|url\(#)([^\")]+)")
_PATH = re.compile(r"\bd=\"([^\"]*)\"")
_COMMAND = re.compile(r"\s*([MLCQz])\s*")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_PLACE = re.compile(r"\b([xy])=\"(-?\d+\.\d+)\"")
#: What matplotlib writes and no one sees: its font names (the page sets its own), turns by nothing,
#: empty groups, and outlines without fill or stroke.
_UNSEEN = re.compile(
    r"font-family: [^;\"]*; |\s*transform=\"rotate\(-0 [^\"]*\"|<g/>\n?"
    r"|<path d=\"[^\"]*\" style=\"fill: none\"/>\n?"
)


@house_style
def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an `<svg>` element to paste into a page.

    Args:
        figure: the picture.
        prefix: unique in the page; every id inside starts with it.
        description: what the picture shows, for readers who do not see it.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = _METADATA.sub("", _PROLOGUE.sub("", buffer.getvalue(), count=1))
    text = _PATH.sub(lambda found: f'd="{_rounded(found[1])}"', text)
    text = _PLACE.sub(lambda found: f'{found[1]}="{_short(found[2])}"', _UNSEEN.sub("", text))
    text = _private_ids(text, prefix)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    head = f'<svg viewBox="\\1" role="img" aria-label="{_literal(description)}">'
    return re.sub(r"\n\s*", "\n", _OPENING.sub(head, text, count=1)).strip()


def _literal(text: str) -> str:
    """Text for an attribute inside a regular-expression replacement."""
    return escape(text, quote=True).replace("\\", "\\\\")


def _rounded(path: str) -> str:
    """Path data with one tenth of a point, finer than any screen shows and half the bytes."""
    return _COMMAND.sub(r"\1", _LONG_NUMBER.sub(lambda found: _short(found[0]), path))


def _short(value: str) -> str:
    return f"{float(value):.1f}".removesuffix(".0")


def _private_ids(text: str, prefix: str) -> str:
    """Drops the ids nothing refers to and gives the others the prefix."""
    used = set(_REFERENCE.findall(text))
    text = _ID.sub(lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", text)
    return re.sub(r"(href=\"#|url\(#)", rf"\g<1>{prefix}-", text)
