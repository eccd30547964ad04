"""What a task is made from: the options of the tasks room, as one validated object."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import GuilomoError, invalid

Kind = Literal["classification", "causal_lm", "lm"]


class TaskConfig(BaseModel):
    """Where the data come from and how they become token ids."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = Field(
        default="classification",
        description="classification (a label per text or pair), causal_lm (prompt and answer; loss on the "
        "answer only) or lm (plain text).",
    )
    source: str = Field(
        default="docstrings",
        description="docstrings (demo made from the standard library of this Python); a .jsonl[.gz|.xz] "
        "file; a folder holding NAME.train.jsonl.gz and NAME.test.jsonl.gz; a .txt[.gz|.xz] file (lm); "
        "hub:OWNER/DATASET[/CONFIG]; disk:DIR. $GUILOMO_DATA and ~ are expanded.",
    )
    held_out_source: str | None = Field(
        default=None,
        description="File of the held-out rows; without it they are taken from the training rows.",
    )
    test_source: str | None = Field(
        default=None, description="File of the test rows, where `source` is a file of training rows only."
    )
    name: str | None = Field(
        default=None,
        description="Name of the task, and of its files in a folder; by default the file's own name.",
    )
    text_column: str | None = Field(
        default=None,
        description="Column with the text (or question). Default for hub: and disk: is 'text'. Set it for a "
        ".jsonl file whose rows do not follow the schema.",
    )
    text2_column: str | None = Field(default=None, description="Column with the second text of a pair.")
    label_column: str | None = Field(
        default=None,
        description="Column with the class, a name or a number. Default 'label' for classification.",
    )
    answer_column: str | None = Field(
        default=None, description="Column with the text to be written. Default 'answer' for causal_lm."
    )
    train_split: str = Field(default="train", description="Split to train on, for hub: and disk: sources.")
    test_split: str = Field(
        default="test",
        description="Split to test on, for hub: and disk: sources; 'validation' where test labels are not public.",
    )
    instruction: str = Field(
        default="", description="Instruction for rows that bring none (hub:, disk: and text_column)."
    )
    template: str = Field(
        default="plain",
        description="Prompt for causal_lm: plain, bare or sections, or a text holding {input}, and if wished "
        "{instruction} and {options}.",
    )
    append_eos: bool = Field(
        default=True,
        description="causal_lm: end answers with the tokenizer's end-of-sequence token, where it has one. "
        "Turn it off for base models that never saw that token.",
    )
    max_length: int = Field(default=256, ge=8, description="Longest row, in tokens.")
    drop_too_long: bool = Field(
        default=False,
        description="causal_lm: leave out rows whose answer alone does not fit into max_length (with a warning) "
        "instead of stopping.",
    )
    pad_to_multiple_of: int = Field(default=8, ge=1, description="Batches are padded to a multiple of so many tokens.")
    held_out_fraction: float = Field(
        default=0.25,
        ge=0.0,
        lt=1.0,
        description="Part of the training rows set aside as held-out rows (the outer problem of the search).",
    )
    test_fraction: float = Field(
        default=0.2,
        gt=0.0,
        lt=1.0,
        description="Part of all rows set aside as test rows, only where the source has no test rows of its own.",
    )
    train_size: int | None = Field(
        default=None,
        ge=2,
        description="Use at most so many training rows (blocks for lm), counted before held-out rows are set aside.",
    )
    test_size: int | None = Field(default=None, ge=1, description="Use at most so many test rows (blocks for lm).")
    seed: int = Field(default=0, description="Seed of every random choice about the data.")


def expand_path(text: str, field: str = "source") -> Path:
    """Expands `$NAME`, `${NAME}` and `~`; a relative path is taken from the current folder.

    Raises:
        GuilomoError: the environment variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if not os.environ.get(name):
            remedy = f"Set it, for example: export {name}=/path/to/folder"
            raise invalid(field, text, f"the environment variable {name} to be set", remedy)
        return os.environ[name]

    expanded = re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, text)
    try:
        return Path(expanded).expanduser().absolute()
    except RuntimeError as error:
        raise GuilomoError(f"{field} = {text!r}: {error}. Spell the folder out.") from error
