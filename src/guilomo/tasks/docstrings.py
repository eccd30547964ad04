"""The demo task that needs no download: from which area of the standard library does a docstring come?

The texts are the docstrings of functions, classes and methods in the standard library of the running Python.
The source files are parsed, never imported. So the rows differ a little between Python versions;
`Task.data_hash` tells.

The split is by file: no source file gives rows to both train and test. In a random split a classifier can get far by
recognising the file (its vocabulary, its favourite phrases) instead of the area. Measured on CPython 3.11 with frozen
MiniLM mean-pooled embeddings and logistic regression (chance 1/7 = 0.14): a random split scored 0.73 to 0.78 over three
seeds; this split by file scores 0.54 on test when fitted on the training rows, and 0.56 with the held-out rows added.

Held-out rows are taken from the training rows as in every other task. They share files with them, so held-out accuracy
(0.74) lies well above test accuracy here: choose by it, but report the test.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ..errors import GuilomoError
from .areas import AREA_NAMES, MODULE_AREA
from .schema import Example

NAME = "docstrings"
INSTRUCTION = "Which area of the Python standard library does this documentation come from?"
SHORTEST, LONGEST = 20, 600  # characters
TRAIN_PER_AREA, TEST_PER_AREA = 220, 80
TEST_FRACTION = 0.3
SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "__pycache__",
}

Row = tuple[str, int, str]
"""File (posix path below the library folder), area index, text."""


@lru_cache(maxsize=1)
def docstring_examples() -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Train and test rows of the demo task; the same for every call on one Python installation.

    Raises:
        GuilomoError: the standard library's source files are not there (some minimal installations ship
            none).
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    by_file = _rows_by_file(folder)
    train: list[Row] = []
    test: list[Row] = []
    for area in range(len(AREA_NAMES)):
        files = {name: rows for name, rows in by_file.items() if rows[0][1] == area}
        train_rows, test_rows = _divide(files)
        train += _subset(train_rows, TRAIN_PER_AREA)
        test += _subset(test_rows, TEST_PER_AREA)
    if min(len(train), len(test)) < 10 * len(AREA_NAMES):
        raise GuilomoError(
            f"source = 'docstrings' is not usable: {folder} holds too few Python source files to make the "
            "demo task. Use another Python installation or another source."
        )
    return _examples(train, "train"), _examples(test, "test")


def _rows_by_file(folder: Path) -> dict[str, list[Row]]:
    """Texts of each file in a fixed order; a text that occurs again anywhere is dropped."""
    seen: set[str] = set()
    found: dict[str, list[Row]] = defaultdict(list)
    for name in sorted(path.relative_to(folder).as_posix() for path in _sources(folder)):
        area = MODULE_AREA[name.split("/")[0].removesuffix(".py")]
        for text in _file_texts(folder / name):
            if text.lower() not in seen:
                seen.add(text.lower())
                found[name].append((name, area, text))
    return dict(found)


def _sources(folder: Path) -> Iterator[Path]:
    for module in MODULE_AREA:
        if (folder / f"{module}.py").is_file():
            yield folder / f"{module}.py"
        for path in (folder / module).rglob("*.py"):
            if not SKIPPED & set(path.relative_to(folder).parts):
                yield path


def _file_texts(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in library files are not the user's concern
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in _definitions(tree.body):
        text = _shorten(ast.get_docstring(node) or "")
        if SHORTEST <= len(text) <= LONGEST:
            yield text


def _definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions, methods and classes at any depth; expressions are not visited, which makes it fast."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node
        for field in ("body", "orelse", "finalbody"):
            yield from _definitions(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _definitions(handler.body)


def _shorten(docstring: str) -> str:
    """The leading paragraphs that fit into `LONGEST` characters, with white space squeezed."""
    text = ""
    for paragraph in docstring.split("\n\n"):
        longer = f"{text} {' '.join(paragraph.split())}".strip()
        if len(longer) > LONGEST:
            break
        text = longer
    return text


def _divide(files: dict[str, list[Row]]) -> tuple[list[Row], list[Row]]:
    """Whole files to train or test; their order comes from a hash of the name, so that it is the same
    everywhere.
    """
    total = sum(len(rows) for rows in files.values())
    train: list[Row] = []
    test: list[Row] = []
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        fits = len(test) + len(files[name]) <= TEST_FRACTION * total
        (test if fits else train).extend(files[name])
    return train, test


def _subset(rows: list[Row], count: int) -> list[Row]:
    return random.Random(0).sample(rows, min(count, len(rows)))


def _examples(rows: list[Row], split: str) -> tuple[Example, ...]:
    rows = random.Random(0).sample(rows, len(rows))
    return tuple(
        Example(
            id=f"{NAME}-{split}-{index}",
            task=NAME,
            split=split,
            type="cls",
            instruction=INSTRUCTION,
            input=text,
            choices=AREA_NAMES,
            label=area,
            answer=AREA_NAMES[area],
        )
        for index, (_, area, text) in enumerate(rows)
    )
