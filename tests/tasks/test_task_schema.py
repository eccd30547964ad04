"""Reading rows: what is accepted, and what the complaints say."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guilomo.errors import GuilomoError
from guilomo.tasks.jsonl import read_jsonl, read_text
from guilomo.tasks.schema import parse_document, parse_example

ROW: dict[str, Any] = {
    "id": "a-1",
    "type": "cls",
    "input": "good film",
    "choices": ["negative", "positive"],
    "label": 1,
    "answer": "positive",
}


def test_a_row_becomes_an_example() -> None:
    example = parse_example({**ROW, "source_id": "x"}, "f, line 1", "train")
    assert (example.id, example.split, example.label, example.answer) == ("a-1", "train", 1, "positive")
    assert example.choices == ("negative", "positive")
    assert example.target is None


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("Sentence 1: A.\nSentence 2: B.", "Sentence 1: A.", "Sentence 2: B."),
        ("Premise: A.\nHypothesis: B.", "Premise: A.", "Hypothesis: B."),
        ("Premise: A.\nSentence 2: B.", "Premise: A.\nSentence 2: B.", None),
        ("one\ntwo", "one\ntwo", None),
    ],
)
def test_headed_pairs_are_taken_apart_without_loss(text: str, first: str, second: str | None) -> None:
    example = parse_example({**ROW, "input": text}, "f", "train")
    assert (example.input, example.input2) == (first, second)
    assert example.full_input == text


def test_an_explicit_pair_is_kept() -> None:
    example = parse_example({**ROW, "input2": "second"}, "f", "train")
    assert example.full_input == "good film\nsecond"


def test_repeated_options_are_real_in_multiple_choice_but_not_in_class_names() -> None:
    row = {**ROW, "choices": ["same", "same"], "answer": "same"}
    assert parse_example({**row, "type": "mc"}, "f", "train").choices == ("same", "same")
    with pytest.raises(GuilomoError, match="differ"):
        parse_example(row, "f", "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": 2}, ["f, line 3: label = 2", "from 0 to 1"]),
        ({"label": -1}, ["label = -1", "unlabelled"]),
        ({"label": True}, ["label = True"]),
        ({"label": "1"}, ["label = '1'"]),
        ({"answer": "negative"}, ["answer", "'positive'"]),
        ({"type": "clf"}, ["'clf'", "Did you mean 'cls'"]),
        ({"input": None}, ["input = None", "a string"]),
        ({"choices": ["one"]}, ["at least two"]),
        ({"choices": None}, ["choices = None"]),
        ({"choices": None, "type": "gen"}, ["null where choices is null"]),
        ({"lable": 1}, ["'lable'", "Did you mean 'label'"]),
        ({"id": ""}, ["id = ''"]),
        ({"id": 1.5}, ["id = 1.5"]),
    ],
)
def test_bad_rows_are_refused_with_place_value_and_remedy(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(GuilomoError) as caught:
        parse_example({**ROW, **change}, "f, line 3", "train")
    for word in [*words, "f, line 3"]:
        assert word in str(caught.value)


def test_missing_fields_are_named() -> None:
    with pytest.raises(GuilomoError, match=r"\['type', 'answer'\].*text_column"):
        parse_example({"id": "1", "input": "x"}, "f", "train")


def test_documents() -> None:
    assert parse_document({"id": 3, "text": "words", "label": "neg"}, "f").id == "3"
    with pytest.raises(GuilomoError, match="a field 'text'"):
        parse_document({"id": "3", "txt": "words"}, "f")


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_compressed_files_and_byte_order_marks(tmp_path: Path, suffix: str) -> None:
    data = b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}\n'
    pack: Any = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(data))
    assert [row["a"] for _, row in read_jsonl(path)] == [1, 2]
    assert [where.rsplit(", ")[1] for where, _ in read_jsonl(path)] == ["line 1", "line 3"]


def test_a_broken_line_is_named(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl("bad.jsonl", ['{"a": 1}', '{"a": '])
    with pytest.raises(GuilomoError, match=r"bad\.jsonl, line 2.*one complete JSON object per line"):
        list(read_jsonl(path))
    path = write_jsonl("list.jsonl", ["[1, 2]"])
    with pytest.raises(GuilomoError, match=r"line 1.*object in braces"):
        list(read_jsonl(path))


def test_damaged_and_mis_encoded_files(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"a": "caf\xe9"}\n'.encode("latin1"))
    with pytest.raises(GuilomoError, match=r"not UTF-8.*0xe9.*iconv"):
        list(read_jsonl(latin))
    with pytest.raises(GuilomoError, match="not UTF-8"):
        read_text(latin)
    for name, data in (("cut.jsonl.gz", gzip.compress(b"x" * 9999)[:-20]), ("not.txt.gz", b"plain"), ("no.xz", b"p")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(GuilomoError, match="cannot be decompressed"):
            list(read_jsonl(tmp_path / name))


def test_empty_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(GuilomoError, match="It is empty"):
        read_text(tmp_path / "empty.txt")
    with pytest.raises(GuilomoError, match=r"existing file.*holds: empty\.txt"):
        read_text(tmp_path / "gone.txt")
