"""Sources, splits and caps."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from guilomo.errors import GuilomoError
from guilomo.tasks import TaskConfig
from guilomo.tasks.config import expand_path
from guilomo.tasks.load import load_documents, load_examples
from guilomo.tasks.split import fraction_count, take

Makers = dict[str, Callable[..., dict[str, Any]]]


def test_every_option_is_described_and_unknown_options_are_refused() -> None:
    assert all(field.description for field in TaskConfig.model_fields.values())
    with pytest.raises(ValidationError, match="sauce"):
        TaskConfig(sauce="docstrings")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="less than 1"):
        TaskConfig(held_out_fraction=1.0)


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GUILOMO_DATA", str(tmp_path))
    assert expand_path("$GUILOMO_DATA/nlp") == expand_path("${GUILOMO_DATA}/nlp") == tmp_path / "nlp"
    monkeypatch.chdir(tmp_path)
    assert expand_path("here.jsonl") == tmp_path / "here.jsonl"
    monkeypatch.delenv("GUILOMO_DATA")
    with pytest.raises(GuilomoError, match=r"GUILOMO_DATA to be set.*export"):
        expand_path("$GUILOMO_DATA/nlp")


def test_held_out_rows_come_from_train_stratified_and_seeded(toy_folder: Path) -> None:
    config = TaskConfig(source=str(toy_folder), name="toy")
    splits = load_examples(config)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 30, "held_out": 10, "test": 10}
    assert Counter(row.label for row in splits["held_out"]) == {0: 5, 1: 5}
    assert {row.split for row in splits["held_out"]} == {"held_out"}
    ids = [{row.id for row in rows} for rows in splits.values()]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 40
    assert load_examples(config) == splits
    other = load_examples(config.model_copy(update={"seed": 1}))
    assert {row.id for row in other["held_out"]} != ids[1]
    assert other["test"] == splits["test"]


@pytest.mark.parametrize("form", ["schema", "columns"])
def test_labels_written_as_floats_are_indices(write_jsonl: Callable[..., Path], rows_of: Makers, form: str) -> None:
    """As pandas writes a column of integers that once had an empty cell."""
    rows = [rows_of["cls"](index) for index in range(20)]
    if form == "columns":
        rows = [{"text": row["input"], "label": row["label"]} for row in rows]
    found = []
    for name, kind in (("whole", int), ("float", float)):
        path = write_jsonl(f"{name}.jsonl", [{**row, "label": kind(row["label"])} for row in rows])
        column = "text" if form == "columns" else None
        splits = load_examples(TaskConfig(source=str(path), text_column=column, name="x"))
        found.append([(row.label, row.choices, row.answer) for row in splits["train"]])
    assert found[0] == found[1]
    assert type(found[1][0][0]) is int


def test_a_label_between_two_classes_is_refused(write_jsonl: Callable[..., Path], rows_of: Makers) -> None:
    half = [rows_of["cls"](index, label=0.5) for index in range(4)]
    with pytest.raises(GuilomoError, match=r"label = 0\.5"):
        load_examples(TaskConfig(source=str(write_jsonl("a.jsonl", half))))
    with pytest.raises(GuilomoError, match=r"label = 0\.5"):
        load_examples(TaskConfig(source=str(write_jsonl("b.jsonl", half)), text_column="input"))


@pytest.mark.parametrize("kind", ["classification", "causal_lm"])
def test_an_empty_file_of_columns_says_what_to_check(write_jsonl: Callable[..., Path], kind: str) -> None:
    config = TaskConfig(kind=kind, source=str(write_jsonl("none.jsonl", [])), text_column="text")  # type: ignore[arg-type]
    with pytest.raises(GuilomoError, match=r"none\.jsonl holds no rows: .*Check the path and the file's content"):
        load_examples(config)


def test_caps_keep_the_classes_balanced(toy_folder: Path) -> None:
    splits = load_examples(TaskConfig(source=str(toy_folder), name="toy", train_size=8, test_size=4))
    assert (len(splits["train"]), len(splits["held_out"]), len(splits["test"])) == (6, 2, 4)
    assert Counter(row.label for row in splits["test"]) == {0: 2, 1: 2}


def test_one_file_gives_its_own_test_rows_or_lends_some(write_jsonl: Callable[..., Path], rows_of: Makers) -> None:
    both = [rows_of["cls"](i) for i in range(20)] + [rows_of["cls"](i, "test") for i in range(6)]
    splits = load_examples(TaskConfig(source=str(write_jsonl("both.jsonl", both))))
    assert {row.split for row in splits["test"]} == {"test"}
    assert len(splits["test"]) == 6
    splits = load_examples(TaskConfig(source=str(write_jsonl("one.jsonl", both[:20]))))
    assert [len(splits[name]) for name in ("train", "held_out", "test")] == [12, 4, 4]


def test_separate_files(write_jsonl: Callable[..., Path], rows_of: Makers) -> None:
    paths = [str(write_jsonl(f"{name}.jsonl", [rows_of["cls"](i, name) for i in range(4)])) for name in ("a", "b", "c")]
    splits = load_examples(TaskConfig(source=paths[0], held_out_source=paths[1], test_source=paths[2]))
    assert [rows[0].id[0] for rows in splits.values()] == ["a", "b", "c"]


def test_columns_of_a_jsonl_file(write_jsonl: Callable[..., Path]) -> None:
    rows = [{"review": f"text {i}", "verdict": "bad" if i % 3 else "good"} for i in range(12)]
    path = str(write_jsonl("reviews.jsonl", rows))
    config = TaskConfig(source=path, text_column="review", label_column="verdict")
    train = load_examples(config)["train"]
    assert train[0].choices == ("bad", "good")
    assert all(row.answer == row.choices[row.label] for row in train)  # type: ignore[index]
    with pytest.raises(GuilomoError, match=r"text_column = 'text'.*review, verdict"):
        load_examples(config.model_copy(update={"text_column": "text"}))
    with pytest.raises(GuilomoError, match=r"missing fields.*set text_column"):
        load_examples(TaskConfig(source=path))
    gen = TaskConfig(kind="causal_lm", source=path, text_column="review", answer_column="verdict")
    assert {row.type for row in load_examples(gen)["train"]} == {"gen"}


def test_data_sets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {}
    for name, size in (("train", 8), ("validation", 4)):
        rows = {"text": [f"{name} {i}" for i in range(size)], "label": [i % 2 for i in range(size)]}
        parts[name] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    source = f"disk:{tmp_path / 'saved'}"
    with pytest.raises(GuilomoError, match=r"test_split = 'test'.*train, validation"):
        load_examples(TaskConfig(source=source))
    splits = load_examples(TaskConfig(source=source, test_split="validation"))
    assert splits["test"][0].choices == ("no", "yes")
    assert [len(rows) for rows in splits.values()] == [6, 2, 4]
    parts["train"].save_to_disk(str(tmp_path / "single"))
    assert len(load_examples(TaskConfig(source=f"disk:{tmp_path / 'single'}"))["test"]) == 2
    documents = load_documents(TaskConfig(kind="lm", source=source, test_split="validation"))
    assert [document.text for document in documents["test"] or []][:1] == ["validation 0"]
    with pytest.raises(GuilomoError, match="save_to_disk"):
        load_examples(TaskConfig(source=f"disk:{tmp_path / 'gone'}"))
    with pytest.raises(GuilomoError, match="hub:OWNER/DATASET"):
        load_examples(TaskConfig(source="hub:a/b/c/d"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "gone.jsonl"}, "gone.jsonl.*existing file or folder"),
        ({"name": None}, "name = None.*toy"),
        ({"name": "tay"}, "name = 'tay'.*toy.train.jsonl.gz"),
        ({"kind": "lm", "source": "docstrings"}, "a text for kind 'lm'"),
    ],
)
def test_bad_sources(toy_folder: Path, changes: dict[str, Any], words: str) -> None:
    config = TaskConfig(**{"source": str(toy_folder), "name": "toy", **changes})
    with pytest.raises(GuilomoError, match=words):
        (load_documents if config.kind == "lm" else load_examples)(config)


def test_files_with_too_few_rows(write_jsonl: Callable[..., Path], rows_of: Makers) -> None:
    with pytest.raises(GuilomoError, match="empty: expected one JSON object"):
        load_examples(TaskConfig(source=str(write_jsonl("none.jsonl", []))))
    with pytest.raises(GuilomoError, match="1 row"):
        load_examples(TaskConfig(source=str(write_jsonl("one.jsonl", [rows_of["cls"](0)]))))
    two = [rows_of["cls"](0), rows_of["cls"](1)]
    with pytest.raises(GuilomoError, match="holds 1 row: expected at least 2"):
        load_examples(TaskConfig(source=str(write_jsonl("two.jsonl", two))))


def test_repeated_ids_and_leaked_texts_are_warned_of(write_jsonl: Callable[..., Path], rows_of: Makers) -> None:
    train = str(write_jsonl("train.jsonl", [rows_of["cls"](i) for i in range(8)]))
    test = [rows_of["cls"](i, "test", id=f"train-{i}") for i in range(2)]
    with pytest.warns(UserWarning, match="2 example ids occur more than once"):
        load_examples(TaskConfig(source=train, test_source=str(write_jsonl("ids.jsonl", test))))
    test = [rows_of["cls"](i, "test", input=f"the train number {i}") for i in range(2)]
    with pytest.warns(UserWarning, match="2 test rows have the same text"):
        load_examples(TaskConfig(source=train, test_source=str(write_jsonl("text.jsonl", test))))


def test_take_is_exact_stratified_and_keeps_the_order() -> None:
    generator = random.Random(0)
    for _ in range(50):
        strata = [generator.choice("abc") for _ in range(generator.randint(1, 60))]
        count = generator.randint(0, len(strata))
        first, rest = take(range(len(strata)), count, 3, strata)
        assert len(first) == count
        assert sorted(first + rest) == list(range(len(strata)))
        assert first == sorted(first)
        for key, size in Counter(strata).items():
            share = sum(strata[index] == key for index in first)
            assert abs(share - size * count / len(strata)) < 1
    with pytest.raises(GuilomoError, match="rows to take = 5"):
        take([1], 5, 0, [None])


def test_fractions_leave_something_on_both_sides() -> None:
    assert [fraction_count(2, 0.01, "x"), fraction_count(2, 0.99, "x"), fraction_count(9, 0.0, "x")] == [1, 1, 0]
    with pytest.raises(GuilomoError, match="1 row"):
        fraction_count(1, 0.5, "x")


def test_no_warning_for_clean_data(toy_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_examples(TaskConfig(source=str(toy_folder), name="toy"))
