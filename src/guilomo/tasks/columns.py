"""Rows of other forms (data sets with their own column names) turned into examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import invalid
from .config import TaskConfig
from .schema import Document, Example

Located = tuple[str, Mapping[str, Any]]
"""Where a row stands (for complaints), and the row."""


def column_documents(rows: Iterable[Located], config: TaskConfig) -> list[Document]:
    """Plain texts from `text_column`.

    Raises:
        GuilomoError: the column is missing or does not hold text.
    """
    column = config.text_column or "text"
    return [Document(str(index), _text(row, column, "text_column", where)) for index, (where, row) in enumerate(rows)]


def column_examples(
    rows: Iterable[Located], config: TaskConfig, split: str, names: Sequence[str] | None
) -> list[Example]:
    """Examples from `text_column`, `text2_column` and `label_column` (classification) or `answer_column`.

    Args:
        rows: the rows with their places.
        config: names of the columns; the instruction.
        split: name of the split.
        names: the label names, see `label_names`; None for causal_lm.

    Raises:
        GuilomoError: a column is missing, or a value is not usable.
    """
    text, second = config.text_column or "text", config.text2_column
    examples = []
    for index, (where, row) in enumerate(rows):
        label = None if names is None else _label(row, config.label_column or "label", names, where)
        answer_column = config.answer_column or "answer"
        answer = _text(row, answer_column, "answer_column", where) if names is None or label is None else names[label]
        examples.append(
            Example(
                id=f"{split}-{row.get('id', index)}",
                task=config.name or "",
                split=split,
                type="gen" if names is None else "cls",
                instruction=config.instruction,
                input=_text(row, text, "text_column", where),
                choices=None if names is None else tuple(names),
                label=label,
                answer=answer,
                input2=_text(row, second, "text2_column", where) if second else None,
            )
        )
    return examples


def label_names(rows: Iterable[Located], column: str, field: str = "label_column") -> list[str]:
    """The sorted names of all classes that occur; numbers are sorted as numbers.

    Raises:
        GuilomoError: the column is missing.
    """
    values = {_value(row, column, field, where) for where, row in rows}
    return [str(value) for value in sorted(values, key=lambda value: (isinstance(value, str), value))]


def _label(row: Mapping[str, Any], column: str, names: Sequence[str], where: str) -> int:
    value = _value(row, column, "label_column", where)
    if str(value) in names:
        return names.index(str(value))
    if isinstance(value, int) and 0 <= value < len(names):
        return value
    allowed = f"one of {', '.join(names)}, or an index from 0 to {len(names) - 1}"
    remedy = "-1 marks unlabelled rows: choose another test_split, such as validation."
    raise invalid(f"{where}: {column}", value, allowed, remedy if value == -1 else "")


def _value(row: Mapping[str, Any], column: str, field: str, where: str) -> Any:
    if column not in row:
        raise invalid(field, column, f"one of the columns of {where}: {', '.join(sorted(row))}")
    value = row[column]
    if isinstance(value, float) and value.is_integer():
        # A table with one empty label turns the whole column of integers into floats.
        return int(value)
    if not isinstance(value, (str, int)):
        raise invalid(f"{where}: {column}", value, "a class name or an integer")
    return value


def _text(row: Mapping[str, Any], column: str, field: str, where: str) -> str:
    if column not in row:
        raise invalid(field, column, f"one of the columns of {where}: {', '.join(sorted(row))}")
    value = row[column]
    if not isinstance(value, str):
        raise invalid(f"{where}: {column}", value, "text", f"Set {field} to a column that holds text.")
    return value
