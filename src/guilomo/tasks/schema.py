"""One example of a task, and the strict parsing of its JSON form.

A JSON object has the fields `id, task, split, type, instruction, input, choices, label, answer` and, where
useful, `target` (a worked answer to train on), `input2` (second text of a pair) and `source_id` (ignored
here). Plain text for language modelling is `{"id": ..., "text": ...}`.

Pairs: `input2` is the second text. Where a classification row carries no `input2` but its `input` is two
lines that begin with "Sentence 1:" / "Sentence 2:" or "Premise:" / "Hypothesis:", the lines become `input`
and `input2`, each keeping its heading, so that `full_input` gives back exactly what the file said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GuilomoError, invalid, unknown

TYPES = ("cls", "mc", "gen")
REQUIRED = ("id", "type", "input", "answer")
OPTIONAL = ("task", "split", "instruction", "input2", "choices", "label", "target", "source_id")
PAIR_HEADINGS = (("Sentence 1:", "Sentence 2:"), ("Premise:", "Hypothesis:"))


@dataclass(frozen=True)
class Example:
    """One question with its answer.

    Attributes:
        id: unique within the task; results are paired by it.
        task: name of the task the row came from.
        split: the split it came from ("train", "held_out", "test", or what the source says).
        type: "cls" (label names are the same in all rows), "mc" (each row has its own options), "gen" (free
            text).
        instruction: what to do with the input; may be empty.
        input: the text, or the first text of a pair.
        choices: label names or options; None for "gen".
        label: index of the right choice; None for "gen".
        answer: the answer in words; for "cls" and "mc" it equals `choices[label]`.
        target: what a language model should write, where that is more than `answer` (a worked solution).
        input2: second text of a pair, or None.
    """

    id: str
    task: str
    split: str
    type: str
    instruction: str
    input: str
    choices: tuple[str, ...] | None
    label: int | None
    answer: str
    target: str | None = None
    input2: str | None = None

    @property
    def full_input(self) -> str:
        """`input`, and below it `input2` where there is one."""
        return self.input if self.input2 is None else f"{self.input}\n{self.input2}"


@dataclass(frozen=True)
class Document:
    """A stretch of plain text for language modelling."""

    id: str
    text: str


def parse_example(row: Mapping[str, Any], where: str, split: str) -> Example:
    """Builds an `Example` from a JSON object.

    Args:
        row: the decoded object.
        where: file and line, put in front of every complaint.
        split: used where the row does not name its split.

    Raises:
        GuilomoError: a field is missing, unknown, of the wrong type, or contradicts another.
    """
    _check_fields(row, where)
    kind = _text(row, "type", where)
    if kind not in TYPES:
        raise unknown(f"{where}: type", kind, TYPES)
    choices = _choices(row, kind, where)
    label = _label(row, choices, where)
    answer = _text(row, "answer", where)
    if choices is not None and label is not None and choices[label] != answer:
        raise invalid(f"{where}: answer", answer, f"choices[label], which is {choices[label]!r}")
    first, second = _pair(row, kind, where)
    return Example(
        id=_identifier(row, where),
        task=_text(row, "task", where, default=""),
        split=_text(row, "split", where, default=split),
        type=kind,
        instruction=_text(row, "instruction", where, default=""),
        input=first,
        choices=choices,
        label=label,
        answer=answer,
        target=_text(row, "target", where) if row.get("target") is not None else None,
        input2=second,
    )


def parse_document(row: Mapping[str, Any], where: str) -> Document:
    """Builds a `Document` from `{"id", "text"}`; other fields are allowed and ignored.

    Raises:
        GuilomoError: `text` is missing or not a string, or `id` is not usable.
    """
    if "text" not in row:
        raise invalid(f"{where}: fields", sorted(row), "a field 'text'", "Rename the text field, or set text_column.")
    return Document(id=_identifier(row, where), text=_text(row, "text", where))


def _check_fields(row: Mapping[str, Any], where: str) -> None:
    missing = [field for field in REQUIRED if field not in row]
    if missing:
        remedy = "Add them, or set text_column and label_column for rows of another form."
        raise invalid(f"{where}: missing fields", missing, f"{', '.join(REQUIRED)} in every row", remedy)
    for field in row:
        if field not in REQUIRED + OPTIONAL:
            raise unknown(f"{where}: field", field, REQUIRED + OPTIONAL)


def _text(row: Mapping[str, Any], field: str, where: str, default: str | None = None) -> str:
    value = row.get(field, default)
    if not isinstance(value, str):
        raise invalid(f"{where}: {field}", value, "a string")
    return value


def _identifier(row: Mapping[str, Any], where: str) -> str:
    value = row.get("id")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise invalid(f"{where}: id", value, "a non-empty string or an integer")
    return str(value)


def _choices(row: Mapping[str, Any], kind: str, where: str) -> tuple[str, ...] | None:
    value = row.get("choices")
    if value is None:
        if kind == "gen":
            return None
        raise invalid(f"{where}: choices", value, f"a list of at least two strings for type {kind!r}")
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) for item in value):
        raise invalid(f"{where}: choices", value, "a list of at least two strings")
    # Published multiple-choice sets do repeat an option now and then; scoring then compares the words.
    if kind == "cls" and len(set(value)) != len(value):
        raise invalid(f"{where}: choices", value, "class names that differ from each other")
    return tuple(value)


def _label(row: Mapping[str, Any], choices: tuple[str, ...] | None, where: str) -> int | None:
    value = row.get("label")
    if choices is None:
        if value is not None:
            raise invalid(f"{where}: label", value, "null where choices is null")
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        remedy = "Labels are indices that start at 0; -1 marks an unlabelled row, which cannot be used."
        raise invalid(f"{where}: label", value, f"an integer from 0 to {len(choices) - 1}", remedy)
    return value


def _pair(row: Mapping[str, Any], kind: str, where: str) -> tuple[str, str | None]:
    text = _text(row, "input", where)
    if row.get("input2") is not None:
        return text, _text(row, "input2", where)
    lines = text.split("\n")
    if kind == "cls" and len(lines) == 2:
        for first, second in PAIR_HEADINGS:
            if lines[0].startswith(first) and lines[1].startswith(second):
                return lines[0], lines[1]
    return text, None


def require_examples(rows: list[Any], where: str) -> None:
    """Refuses an empty source and a source of one row, from which nothing can be learned or measured.

    Raises:
        GuilomoError: fewer than two rows.
    """
    if len(rows) < 2:
        found = "no rows" if not rows else "1 row"
        raise GuilomoError(f"{where} holds {found}: expected at least 2. Check the path and the file's content.")
