"""From a `TaskConfig` to untokenised rows: finds the source, reads it, divides it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from ..errors import GuilomoError, invalid, unknown
from .columns import Located, column_documents, column_examples, label_names
from .config import TaskConfig, expand_path
from .docstrings import docstring_examples
from .hub import load_dataset_rows
from .jsonl import read_jsonl, read_text
from .schema import Document, Example, parse_document, parse_example, require_examples
from .split import check_splits, fraction_count, strata_of, take

SUFFIXES = ("", ".gz", ".xz")


@dataclass(frozen=True)
class Sources:
    """The files behind a task, before they are read; held_out and test may be missing."""

    train: Path
    held_out: Path | None
    test: Path | None


def task_name(config: TaskConfig) -> str:
    """`name`, or what the source is called."""
    if config.name:
        return config.name
    if config.parts:
        return "+".join(config.part_names)
    if config.source.startswith(("hub:", "disk:")):
        return config.source.rstrip("/").split("/")[-1].split(":")[-1]
    return Path(config.source).name.split(".")[0] or config.source


def load_examples(config: TaskConfig) -> dict[str, list[Example]]:
    """The rows of "train", "held_out" and "test" for classification and causal_lm.

    Raises:
        GuilomoError: the source cannot be read or does not fit the kind of task.
    """
    train, held_out, test = _rows_of(config.rows_of, *_read_examples(config))
    if test is None:
        require_examples(train, config.source)
        count = fraction_count(len(train), config.test_fraction, "test rows")
        test, train = take(train, count, config.seed, strata_of(train, config.kind))
    for rows, where in ((train, f"{config.source} (train)"), (test, f"{config.source} (test)")):
        require_examples(rows, where)
    train = _cap(train, config.train_size, config)
    test = _cap(test, config.test_size, config)
    if held_out is None:
        count = fraction_count(len(train), config.held_out_fraction, "held-out rows")
        held_out, train = take(train, count, config.seed + 1, strata_of(train, config.kind))
        held_out = [replace(example, split="held_out") for example in held_out]
    splits = {"train": train, "held_out": held_out, "test": test}
    check_splits(splits)
    return splits


def load_documents(config: TaskConfig) -> dict[str, list[Document] | None]:
    """The texts for `kind: lm`; "held_out" and "test" are None where no separate source gives them.

    Raises:
        GuilomoError: the source cannot be read, or is the demo task, which has no running text.
    """
    if config.source == "docstrings":
        raise invalid("source", "docstrings", "a text for kind 'lm'", "Give a .txt or .jsonl file, or another kind.")
    if config.source.startswith(("hub:", "disk:")):
        train, test, _ = load_dataset_rows(config)
        documents = None if test is None else column_documents(test, config)
        return {"train": column_documents(train, config), "held_out": None, "test": documents}
    files = find_files(config)
    parts = {"train": files.train, "held_out": files.held_out, "test": files.test}
    return {name: None if path is None else _file_documents(path, config) for name, path in parts.items()}


def find_files(config: TaskConfig) -> Sources:
    """The files that `source`, `held_out_source` and `test_source` name.

    Raises:
        GuilomoError: a file is missing; the message lists what the folder holds.
    """
    path = expand_path(config.source)
    held_out = None if config.held_out_source is None else expand_path(config.held_out_source, "held_out_source")
    test = None if config.test_source is None else expand_path(config.test_source, "test_source")
    if not path.is_dir():
        if not path.exists():
            remedy = "Give a file, a folder, hub:..., disk:... or docstrings."
            raise invalid("source", config.source, f"an existing file or folder ({path} is not there)", remedy)
        return Sources(path, held_out, test)
    if not config.name:
        found = ", ".join(sorted({item.name.split(".")[0] for item in path.glob("*.train.*")})) or "no such files"
        raise invalid("name", config.name, f"the name of a task in {path} ({found})")
    train = _member(path, config.name, "train")
    if train is None:
        found = ", ".join(sorted(item.name for item in path.glob("*.train.*"))) or "no such files"
        raise invalid("name", config.name, f"NAME of a file NAME.train.jsonl[.gz] in {path} ({found})")
    held_out = held_out or _member(path, config.name, "held_out")
    return Sources(train, held_out, test or _member(path, config.name, "test"))


def _member(folder: Path, name: str, split: str) -> Path | None:
    for kind in ("jsonl", "txt"):
        for suffix in SUFFIXES:
            if (folder / f"{name}.{split}.{kind}{suffix}").is_file():
                return folder / f"{name}.{split}.{kind}{suffix}"
    return None


def _read_examples(config: TaskConfig) -> tuple[list[Example], list[Example] | None, list[Example] | None]:
    """Train, held-out (None: to be taken from train) and test rows (None: to be taken from train)."""
    if config.source == "docstrings":
        train_rows, test_rows = docstring_examples()
        return list(train_rows), None, list(test_rows)
    if config.source.startswith(("hub:", "disk:")):
        train, test, declared = load_dataset_rows(config)
        return _from_columns({"train": train, "held_out": None, "test": test}, config, declared)
    files = find_files(config)
    paths = {"train": files.train, "held_out": files.held_out, "test": files.test}
    if config.text_column is not None:
        located: dict[str, list[Located] | None] = {
            name: None if path is None else list(read_jsonl(path)) for name, path in paths.items()
        }
        return _from_columns(located, config, None)
    parsed = {name: None if path is None else _file_examples(path, name) for name, path in paths.items()}
    return _by_own_split(parsed["train"] or [], parsed["held_out"], parsed["test"])


def _by_own_split(
    rows: list[Example], held_out: list[Example] | None, test: list[Example] | None
) -> tuple[list[Example], list[Example] | None, list[Example] | None]:
    """One file may hold several splits, told apart by the field `split`."""
    if test is None:
        own = [row for row in rows if row.split == "test"]
        rows = [row for row in rows if row.split != "test"]
        test = own or None
    if held_out is None:
        own = [row for row in rows if row.split == "held_out"]
        rows = [row for row in rows if row.split != "held_out"]
        held_out = own or None
    return rows, held_out, test


def _rows_of(
    task: str | None, rows: list[Example], held_out: list[Example] | None, test: list[Example] | None
) -> tuple[list[Example], list[Example] | None, list[Example] | None]:
    """The rows whose own field says this task; all where none is asked for."""
    if task is None:
        return rows, held_out, test
    if task not in (found := sorted({row.task for row in rows})):
        raise unknown("rows_of", task, found)
    kept = [None if part is None else [row for row in part if row.task == task] for part in (rows, held_out, test)]
    return kept[0] or [], kept[1], kept[2]


def _from_columns(
    located: dict[str, list[Located] | None], config: TaskConfig, declared: list[str] | None
) -> tuple[list[Example], list[Example] | None, list[Example] | None]:
    names = declared if config.kind == "classification" else None
    if config.kind == "classification" and names is None:
        everything: Iterable[Located] = chain.from_iterable(rows or [] for rows in located.values())
        names = label_names(everything, config.label_column or "label")
    parts = {
        name: None if rows is None else column_examples(rows, config, name, names) for name, rows in located.items()
    }
    return parts["train"] or [], parts["held_out"], parts["test"]


def _file_examples(path: Path, split: str) -> list[Example]:
    if ".jsonl" not in path.suffixes:
        raise invalid("source", str(path), "a .jsonl file for classification and causal_lm", "Use kind: lm for text.")
    rows = [parse_example(row, where, split) for where, row in read_jsonl(path)]
    if not rows:
        raise GuilomoError(f"{path} is empty: expected one JSON object per line.")
    return rows


def _file_documents(path: Path, config: TaskConfig) -> list[Document]:
    if ".jsonl" not in path.suffixes:
        return [Document(path.name, read_text(path))]
    if config.text_column is not None:
        documents = column_documents(read_jsonl(path), config)
    else:
        documents = [parse_document(row, where) for where, row in read_jsonl(path)]
    if not documents:
        raise GuilomoError(f"{path} is empty: expected one JSON object per line.")
    return documents


def _cap(rows: list[Example], size: int | None, config: TaskConfig) -> list[Example]:
    if size is None or size >= len(rows):
        return rows
    return take(rows, size, config.seed, strata_of(rows, config.kind))[0]
