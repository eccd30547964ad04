"""Several tasks as one: rows that know their task, joint classes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from guilomo.errors import GuilomoError
from guilomo.tasks import Task, TaskConfig, build_task, task_from
from guilomo.tasks.task import SPLITS

Makers = dict[str, Callable[..., dict[str, Any]]]


def names(task: Task, split: str) -> list[str]:
    return [str(row["example"]) for row in task.rows(split)]


@pytest.fixture
def two_kinds(write_jsonl: Callable[..., Path], rows_of: Makers) -> Path:
    """toy (two classes) and size (three), with 40 and 20 training rows and 10 and 5 test rows."""
    sizes = ["small", "middle", "large"]

    def size(index: int, split: str) -> dict[str, Any]:
        row = rows_of["cls"](index, split, choices=sizes, label=index % 3, answer=sizes[index % 3])
        return row | {"input": f"{split} size {index}", "task": "size"}

    write_jsonl("toy.train.jsonl", [rows_of["cls"](index) for index in range(40)])
    write_jsonl("toy.test.jsonl", [rows_of["cls"](index, "test") for index in range(10)])
    write_jsonl("size.train.jsonl", [size(index, "train") for index in range(20)])
    return write_jsonl("size.test.jsonl", [size(index, "test") for index in range(5)]).parent


def test_rows_are_those_of_the_parts(two_kinds: Path, minilm: Any) -> None:
    """In the order of the parts, with their ids, and classes that are told apart."""
    common = {"source": str(two_kinds), "max_length": 32}
    parts = [build_task(TaskConfig(name=name, **common), minilm) for name in ("toy", "size")]
    task = build_task(TaskConfig(parts=["toy", "size"], **common), minilm)
    assert (task.name, task.parts, task.kind) == ("toy+size", ("toy", "size"), "classification")
    assert task.labels == ["toy: even", "toy: odd", "size: small", "size: middle", "size: large"]
    for split in SPLITS:
        own = [(place, row) for place, part in enumerate(parts) for row in part.rows(split)]
        assert len(own) == len(task.rows(split)) > 0
        for (place, row), mixed in zip(own, task.rows(split), strict=True):
            assert mixed["router_task_ids"] == place
            assert mixed["labels"] == row["labels"] + (2 if place else 0)
            assert mixed["example"] == f"{task.parts[place]}/{row['example']}"
            assert {k: mixed[k] for k in ("input_ids", "attention_mask")} == {
                k: row[k] for k in ("input_ids", "attention_mask")
            }
        for row, example in zip(task.rows(split), task.examples[split], strict=True):
            assert (example.id, task.task_id(example)) == (row["example"], row["router_task_ids"])
            assert example.choices is not None
            assert example.choices[row["labels"]] == example.answer == task.labels[row["labels"]]
    ends = [task.test[0], task.test[-1]]
    assert task.collate(ends)["router_task_ids"].tolist() == [0, 1]
    assert len({task.data_hash, *(part.data_hash for part in parts)}) == 3


def test_equal_classes_stay_one(two_kinds: Path, minilm: Any) -> None:
    config = TaskConfig(source=str(two_kinds), parts=[{"name": "toy"}, {"name": "again", "seed": 3}], max_length=32)
    with pytest.raises(GuilomoError, match="again"):
        build_task(config, minilm)  # a part's name is that of its files
    source = str(two_kinds / "toy.train.jsonl")
    again = {"name": "again", "source": source, "train_size": 10}
    task = build_task(TaskConfig(parts=[{"name": "toy", "source": source}, again], max_length=32), minilm)
    assert task.labels == ["even", "odd"]
    assert {row["labels"] for row in task.train} == {0, 1}
    assert sum(row["router_task_ids"] for row in [*task.train, *task.held_out]) == 10


def test_a_single_task_has_no_ids(toy_folder: Path, minilm: Any) -> None:
    task = build_task(TaskConfig(source=str(toy_folder), name="toy"), minilm)
    assert task.parts == ()
    assert task.task_id(task.examples["test"][0]) is None
    assert "router_task_ids" not in task.collate(task.test[:2])


def test_questions_and_texts_mix(choice_folder: Path, toy_folder: Path, bpe: Any) -> None:
    assert choice_folder == toy_folder
    config = TaskConfig(kind="causal_lm", source=str(toy_folder), parts=["toy", "quiz"], max_length=96)
    task = build_task(config, bpe)
    assert [len(task.rows(split)) for split in SPLITS] == [39, 13, 16]
    assert task.examples["test"][0].choices == ("even", "odd")  # options stay a row's own
    (toy_folder / "a.txt").write_text("one thing after another " * 30)
    (toy_folder / "b.txt").write_text("another thing before one " * 30)
    words = f"{toy_folder}/a.txt+{toy_folder}/b.txt"
    texts = build_task(TaskConfig(**task_from(words), max_length=16), bpe)
    assert (texts.kind, texts.parts) == ("lm", ("a", "b"))
    assert len(set(names(texts, "train") + names(texts, "held_out") + names(texts, "test"))) == sum(
        len(texts.rows(split)) for split in SPLITS
    )


def test_the_rows_of_one_task_in_a_file_of_several(write_jsonl: Callable[..., Path], rows_of: Makers, bpe: Any) -> None:
    rows = [rows_of["cls"](index, task="ab"[index % 3 == 0]) for index in range(30)]
    source = str(write_jsonl("both.jsonl", rows))
    parts = [{"name": "a", "rows_of": "a"}, {"name": "b", "rows_of": "b"}]
    task = build_task(TaskConfig(source=source, parts=parts, max_length=64), bpe)
    counts = [sum(row["router_task_ids"] == place for s in SPLITS for row in task.rows(s)) for place in (0, 1)]
    assert counts == [20, 10]
    with pytest.raises(GuilomoError, match=r"rows_of = 'aa'.*Did you mean 'a'|rows_of = 'aa'.*'a', 'b'"):
        build_task(TaskConfig(source=source, rows_of="aa", max_length=64), bpe)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("docstrings+rows/cola", {"name": "docstrings+cola", "parts": ["docstrings", "cola"]}),
        ("a.txt+b.txt.xz", {"name": "a+b", "parts": ["a", "b"], "kind": "lm"}),
    ],
)
def test_several_in_one_word(text: str, keys: dict[str, Any]) -> None:
    found = task_from(text)
    assert {**found, "parts": [part["name"] for part in found["parts"]]} == keys
    assert not any("kind" in part for part in found["parts"])


def test_a_plus_in_a_path_is_no_joint(tmp_path: Path) -> None:
    folder = tmp_path / "a+b"
    folder.mkdir()
    (folder / "x+y.txt").write_text("text")
    assert task_from(f"{folder}/cola") == {"name": "cola", "source": str(folder)}
    assert task_from(f"{folder}/x+y.txt")["source"] == f"{folder}/x+y.txt"
    assert task_from("c++/cola") == {"name": "cola", "source": "c++"}
    assert len(task_from(f"{tmp_path}/c/cola+docstrings")["parts"]) == 2


def test_words_for_parts() -> None:
    """A bare word is a name in the common folder, except for the demo task."""
    in_folder = TaskConfig(source="data", parts=["cola", "docstrings", "other/rte", {"name": "x", "train_size": 5}])
    assert [part.get("source") for part in in_folder.parts] == [None, "docstrings", "other", None]
    configs = in_folder.part_configs()
    assert [config.source for config in configs] == ["data", "docstrings", "other", "data"]
    assert [config.train_size for config in configs] == [None, None, None, 5]
    again = TaskConfig.model_validate(in_folder.model_dump())
    assert again.part_configs() == configs


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": ["a"]}, r"parts = \['a'\] is not usable: expected at least 2 parts"),
        ({"parts": ["a", "a"]}, r"each with a name of its own"),
        ({"parts": ["a", {"source": "b"}]}, r"each with a name of its own"),
        ({"parts": ["a", {"name": "b", "max_length": 9}]}, r"part 'b' has the key 'max_length', which all parts share"),
        ({"parts": ["a", {"name": "b", "sourc": "x"}]}, r"key of part 'b' = 'sourc'.*Did you mean 'source'"),
        ({"parts": ["a", {"name": "b", "train_size": "one"}]}, r"part 'b' is not usable: train_size = 'one'"),
        ({"kind": "lm", "rows_of": "a"}, r"rows_of = 'a' is not usable here"),
        ({"source": "hub:a/b", "rows_of": "a"}, r"rows_of = 'a' is not usable here"),
        ({"kind": "lm", "parts": ["a", {"name": "b", "rows_of": "x"}]}, r"part 'b' is not usable: .*rows_of = 'x'"),
        ({"parts": ["a", "b"], "test_source": "x.jsonl"}, r"give them to the parts that have them"),
    ],
)
def test_parts_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TaskConfig(**changes)
