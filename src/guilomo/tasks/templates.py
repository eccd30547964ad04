"""Prompts: how an example is put into words for a language model."""

from __future__ import annotations

import re

from ..errors import invalid, unknown
from .schema import Example

TEMPLATES = {
    "plain": "{instruction}\n{input}\n{options}\nAnswer:",
    "bare": "{input}\nAnswer:",
    "sections": "### Instruction\n{instruction}\n\n### Input\n{input}\n{options}\n\n### Response\n",
}
PLACEHOLDERS = ("instruction", "input", "options")
_FIELD = re.compile(r"\{(\w*)\}")


def resolve_template(template: str) -> str:
    """The text of a named template, or the literal itself after a check.

    Raises:
        GuilomoError: no such name, a literal without {input}, or a placeholder that does not exist.
    """
    if "{" not in template:
        if template not in TEMPLATES:
            raise unknown("template", template, TEMPLATES)
        return TEMPLATES[template]
    found = _FIELD.findall(template)
    for name in found:
        if name not in PLACEHOLDERS:
            raise unknown("template: placeholder", name, PLACEHOLDERS)
    if "input" not in found:
        raise invalid("template", template, "a text that holds {input}")
    return template


def render_prompt(template: str, example: Example) -> str:
    """Fills a resolved template; a line that is only an empty placeholder is left out.

    Values are put in as they are: braces inside an example are not read as placeholders.
    """
    values = {
        "instruction": example.instruction,
        "input": example.full_input,
        "options": render_options(example.choices),
    }
    lines = []
    for line in template.split("\n"):
        alone = _FIELD.fullmatch(line.strip())
        if alone and not values[alone.group(1)]:
            continue
        lines.append(_FIELD.sub(lambda match: values[match.group(1)], line))
    return "\n".join(lines)


def render_options(choices: tuple[str, ...] | None) -> str:
    """Lettered options, one per line; empty where there are none. After Z come AA, AB, ..."""
    if choices is None:
        return ""
    return "\n".join(f"({letter(index)}) {choice}" for index, choice in enumerate(choices))


def letter(index: int) -> str:
    """0 -> A, 25 -> Z, 26 -> AA."""
    high, low = divmod(index, 26)
    return (letter(high - 1) if high else "") + chr(ord("A") + low)


def completion(example: Example) -> str:
    """What the model should write after the prompt, with its leading space."""
    return " " + (example.target if example.target is not None else example.answer)
