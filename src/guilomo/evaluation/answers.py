"""When is a generated answer right? The stated normalisation, and nothing cleverer.

* A reference that holds "####" (GSM8K): the number after the last "####" must be equal as a number; thousands commas,
  a leading "$" and a trailing "." or "%" are ignored. A generation without "####" is wrong.
* Any other reference: the first line is compared (all lines if the reference has several), in lower case, with white
  space squeezed and the punctuation around it removed.
"""

from __future__ import annotations

import string
from decimal import Decimal, InvalidOperation

MARK = "####"


def is_right(generated: str, reference: str) -> bool:
    """Does the generated text give the reference answer?"""
    if MARK in reference:
        number = final_number(generated)
        return number is not None and number == final_number(reference)
    return normalise(generated, "\n" in reference.strip()) == normalise(reference, True)


def final_number(text: str) -> Decimal | None:
    """The number after the last "####", or None."""
    _, mark, rest = text.rpartition(MARK)
    words = rest.split()
    if not mark or not words:
        return None
    try:
        number = Decimal(words[0].replace(",", "").lstrip("$").rstrip(".%"))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def normalise(text: str, all_lines: bool) -> str:
    """Lower case, single spaces, no punctuation at the ends; only the first line unless `all_lines`."""
    kept = text.strip() if all_lines else text.strip().split("\n")[0]
    return " ".join(kept.lower().split()).strip(string.punctuation + " ")
