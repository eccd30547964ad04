"""What a task is made from: the options of the tasks room, as one validated object."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import GuilomoError, invalid, unknown

Kind = Literal["classification", "causal_lm", "lm"]

DATA_FILE = re.compile(r"\.(jsonl|txt)(\.gz|\.xz)?$")
SHARED_BY_PARTS = ("kind", "template", "append_eos", "max_length", "pad_to_multiple_of", "parts")
"""Keys that a part of a mixed task cannot have for itself: the whole is prompted, cut and batched in one way."""


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
    parts: list[dict[str, Any]] = Field(
        default_factory=list,
        description="Several tasks trained as one. Each with a name and the keys in which it differs from this one, or "
        "one word: a name in the folder of source, docstrings, a data file, FOLDER/NAME, hub:OWNER/DATASET. The place "
        "of a part in this list is the task id of its rows.",
    )
    rows_of: str | None = Field(
        default=None, description="Use only the rows whose own field 'task' is this: a part of a file of mixed tasks."
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

    @model_validator(mode="before")
    @classmethod
    def _parts_in_words(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("parts"), list):
            return value
        parts = [_part_from(part, "source" in value) if isinstance(part, str) else part for part in value["parts"]]
        return {**value, "parts": parts}

    @model_validator(mode="after")
    def _usable_parts(self) -> TaskConfig:
        if not self.parts:
            return self
        names = [part.get("name") for part in self.parts]
        if len(names) < 2 or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError(f"parts = {names} is not usable: expected at least 2 parts, each with a name of its own.")
        if self.held_out_source or self.test_source or self.rows_of:
            raise ValueError(
                "held_out_source, test_source and rows_of are of single tasks: give them to the parts that have them."
            )
        for part in self.parts:
            if shared := sorted(part.keys() & set(SHARED_BY_PARTS)):
                raise ValueError(
                    f"part {part['name']!r} has the key {shared[0]!r}, which all parts share: set it above."
                )
        for part in self.parts:
            for key in part.keys() - TaskConfig.model_fields.keys():
                raise ValueError(str(unknown(f"key of part {part['name']!r}", key, TaskConfig.model_fields)))
            try:
                self._part_config(part)
            except ValidationError as error:
                found = "; ".join(
                    f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()
                )
                raise ValueError(f"part {part['name']!r} is not usable: {found}. See guilomo run --help.") from None
        return self

    @model_validator(mode="after")
    def _rows_with_a_task(self) -> TaskConfig:
        apart = self.kind == "lm" or self.text_column is not None or self.source.startswith(("hub:", "disk:"))
        if self.rows_of is not None and apart:
            raise ValueError(
                f"rows_of = {self.rows_of!r} is not usable here: only rows of the .jsonl schema have a field 'task', "
                "not those of kind lm, text_column, hub: and disk:. Put the rows of each task into a file of its own."
            )
        return self

    @property
    def part_names(self) -> list[str]:
        """Names of the parts in the order of their task ids; empty for a single task."""
        return [part["name"] for part in self.parts]

    def part_configs(self) -> list[TaskConfig]:
        """The parts as tasks: what a part does not say, this says."""
        return [self._part_config(part) for part in self.parts]

    def _part_config(self, part: dict[str, Any]) -> TaskConfig:
        given = self.model_fields_set & TaskConfig.model_fields.keys() - {"name", "parts"}
        return TaskConfig(**{**{name: getattr(self, name) for name in given}, **part})


def task_from(text: str) -> dict[str, Any]:
    """The keys of a task in one word: docstrings, a data file, FOLDER/NAME, hub:...; or several, joined by ``+``.

    A path that is there may have a ``+`` of its own.
    """
    if all(text.split("+")) and "+" in text and not _is_there(text):
        parts = [task_from(word) for word in text.split("+")]
        kinds = {part.pop("kind", None) for part in parts}
        kind = {"kind": "lm"} if kinds == {"lm"} else {}
        return {"name": "+".join(part["name"] for part in parts), "parts": parts, **kind}
    if DATA_FILE.search(text):
        kind = {"kind": "lm"} if ".txt" in PurePath(text).suffixes else {}
        return {"name": PurePath(text).name.partition(".")[0], "source": text, **kind}
    if text.startswith(("hub:", "disk:")):
        return {"name": re.split(r"[:/]", text.rstrip("/"))[-1], "source": text}
    folder, slash, name = text.rpartition("/")
    return {"name": name, "source": folder} if slash else {"name": text, "source": text}


def _is_there(text: str) -> bool:
    """Whether the whole text is a file, or FOLDER/NAME of a folder."""
    try:
        path = expand_path(text)
    except GuilomoError:
        return False
    return path.exists() or ("/" in text and path.parent.is_dir())


def _part_from(word: str, in_folder: bool) -> dict[str, Any]:
    """The keys of a part; with a common folder a bare word is a name in it."""
    part = {key: value for key, value in task_from(word).items() if key != "kind"}
    bare = part.get("source") == word and word != "docstrings" and not DATA_FILE.search(word)
    return {"name": word} if in_folder and bare else part


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
