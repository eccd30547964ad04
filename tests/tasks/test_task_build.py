"""From rows to tensors: prompts, labels, truncation, padding and the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from guilomo.errors import GuilomoError
from guilomo.tasks import Task, TaskConfig, build_task, row_loss
from guilomo.tasks.schema import Document, parse_example
from guilomo.tasks.templates import letter, render_prompt, resolve_template
from guilomo.tasks.tokenize import fit_prompt, start_ids, text_blocks

Makers = dict[str, Callable[..., dict[str, Any]]]


def test_prompts(rows_of: Makers) -> None:
    quiz = parse_example(rows_of["mc"](1, input="Is {options} literal?"), "f", "train")
    plain = render_prompt(resolve_template("plain"), quiz)
    assert plain == "Choose.\nIs {options} literal?\n(A) cat 1\n(B) the mat\n(C) no\nAnswer:"
    free = parse_example({"id": "1", "type": "gen", "input": "2 + 2", "answer": "4"}, "f", "train")
    assert render_prompt(resolve_template("plain"), free) == "2 + 2\nAnswer:"
    assert render_prompt(resolve_template("Q: {input}\nA:"), free) == "Q: 2 + 2\nA:"
    assert [letter(index) for index in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]


@pytest.mark.parametrize(
    ("template", "words"),
    [("plane", "Did you mean 'plain'"), ("{inputs}", "Did you mean 'input'"), ("{options}", "holds {input}")],
)
def test_bad_templates(template: str, words: str) -> None:
    with pytest.raises(GuilomoError, match=words):
        resolve_template(template)


def test_classification_rows(toy_folder: Path, minilm: Any) -> None:
    task = build_task(TaskConfig(source=str(toy_folder), name="toy"), minilm)
    assert (task.name, task.labels, task.num_labels) == ("toy", ["even", "odd"], 2)
    assert [len(task.rows(split)) for split in ("train", "held_out", "test")] == [30, 10, 10]
    for row, example in zip(task.test, task.examples["test"], strict=True):
        assert minilm.decode(row["input_ids"], skip_special_tokens=True) == example.input
        assert (row["labels"], row["example"]) == (example.label, example.id)
    with pytest.raises(GuilomoError, match=r"split = 'tset'.*'test'"):
        task.rows("tset")


def test_pairs_are_two_segments_or_two_lines(
    write_jsonl: Callable[..., Path], rows_of: Makers, minilm: Any, bpe: Any
) -> None:
    rows = [rows_of["cls"](i, input=f"Premise: number {i}.\nHypothesis: it is odd.") for i in range(8)]
    config = TaskConfig(source=str(write_jsonl("pairs.jsonl", rows)))
    task = build_task(config, minilm)
    assert minilm.decode(task.train[0]["input_ids"]).count("[SEP]") == 2
    batch = task.collate(task.train)
    assert set(batch["token_type_ids"].flatten().tolist()) == {0, 1}
    plain = build_task(config, bpe)
    assert "\nHypothesis:" in bpe.decode(plain.train[0]["input_ids"])
    assert "token_type_ids" not in plain.collate(plain.train)


def test_long_texts_are_cut_and_counted(write_jsonl: Callable[..., Path], rows_of: Makers, minilm: Any) -> None:
    rows = [rows_of["cls"](i, input=f"number {i} " + "word " * (100 if i < 3 else 1)) for i in range(12)]
    task = build_task(TaskConfig(source=str(write_jsonl("long.jsonl", rows)), max_length=16), minilm)
    assert sum(task.truncated.values()) == 3
    assert max(len(row["input_ids"]) for row in task.train + task.held_out + task.test) == 16
    assert all(row["input_ids"][-1] == minilm.sep_token_id for row in task.train)


def _answer(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([token for token in row["labels"] if token != -100]))


def test_prompt_rows_train_the_answer_only(choice_folder: Path, bpe: Any) -> None:
    task = build_task(TaskConfig(kind="causal_lm", source=str(choice_folder), name="quiz"), bpe)
    for row, example in zip(task.test, task.examples["test"], strict=True):
        assert row["input_ids"][0] == bpe.bos_token_id
        assert _answer(row, bpe) == f" {example.answer}</s>"
        assert bpe.decode(row["input_ids"]).startswith("<s>Choose.\ntest question")
        first = next(index for index, label in enumerate(row["labels"]) if label != -100)
        assert row["labels"][first:] == row["input_ids"][first:]
    bare = build_task(TaskConfig(kind="causal_lm", source=str(choice_folder), name="quiz", append_eos=False), bpe)
    assert _answer(bare.test[0], bpe) == f" {bare.examples['test'][0].answer}"
    assert bare.data_hash == task.data_hash
    assert task.labels is None
    assert task.num_labels == 0


def test_a_tokenizer_without_special_tokens(choice_folder: Path, bare_bpe: Any) -> None:
    task = build_task(TaskConfig(kind="causal_lm", source=str(choice_folder), name="quiz"), bare_bpe)
    assert start_ids(bare_bpe) == []
    assert _answer(task.test[0], bare_bpe) == f" {task.examples['test'][0].answer}"
    batch = task.collate(task.test)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_long_prompts_lose_their_beginning_never_the_answer(
    write_jsonl: Callable[..., Path], rows_of: Makers, bpe: Any
) -> None:
    rows = [rows_of["mc"](i, input="long " * (50 if i < 2 else 1) + f"{i}?") for i in range(10)]
    config = TaskConfig(kind="causal_lm", source=str(write_jsonl("q.jsonl", rows)), max_length=100)
    task = build_task(config, bpe)
    assert sum(task.truncated.values()) == 2
    every = [(row, split, i) for split in ("train", "held_out", "test") for i, row in enumerate(task.rows(split))]
    for row, split, index in every:
        assert len(row["input_ids"]) <= 100
        assert row["input_ids"][0] == bpe.bos_token_id
        assert "\nAnswer:" in bpe.decode(row["input_ids"])
        assert _answer(row, bpe) == f" {task.examples[split][index].answer}</s>"
    assert fit_prompt(bpe, [bpe.bos_token_id, 5, 6, 7], 2, 5, "x") == [bpe.bos_token_id, 6, 7]


def test_answers_that_do_not_fit(write_jsonl: Callable[..., Path], bpe: Any) -> None:
    rows = [{"id": str(i), "type": "gen", "input": f"q{i}", "answer": "x" * (90 if i == 3 else 4)} for i in range(12)]
    config = TaskConfig(kind="causal_lm", source=str(write_jsonl("g.jsonl", rows)), max_length=40)
    with pytest.raises(GuilomoError, match=r"max_length = 40.*answers of 1 of .*drop_too_long"):
        build_task(config, bpe)
    with pytest.warns(UserWarning, match="1 of .* rows of 'g' were left out"):
        task = build_task(config.model_copy(update={"drop_too_long": True}), bpe)
    kept = {example.id for rows in task.examples.values() for example in rows}
    assert kept == {str(i) for i in range(12)} - {"3"}
    with pytest.raises(GuilomoError, match="Set max_length to 12"):
        fit_prompt(bpe, [bpe.bos_token_id, 5], 10, 8, "x")


def test_text_is_cut_into_contiguous_parts(tmp_path: Path, bpe: Any) -> None:
    text = "".join(f"line {i} of the story\n" for i in range(400))
    (tmp_path / "story.txt").write_text(text)
    task = build_task(TaskConfig(kind="lm", source=str(tmp_path / "story.txt"), max_length=64), bpe)
    rows = task.train + task.held_out + task.test
    assert {len(row["input_ids"]) for row in rows[:-1]} == {64}
    joined = [token for row in rows for token in row["input_ids"]]
    assert bpe.decode(joined) == "<s>" + text
    assert [row["example"] for row in rows] == [f"block-{i}" for i in range(len(rows))]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert len(task.test) == round(0.2 * len(rows))
    capped = build_task(task.config.model_copy(update={"train_size": 8, "test_size": 2}), bpe)
    assert [len(capped.rows(split)) for split in ("train", "held_out", "test")] == [6, 2, 2]


def test_documents_are_joined_by_the_start_or_the_end_token(bpe: Any, bare_bpe: Any, minilm: Any) -> None:
    documents = [Document("1", "The cat"), Document("2", "sat")]
    assert bpe.decode(text_blocks(bpe, documents, 99)[0]) == "<s>The cat<s>sat"
    assert bare_bpe.decode(text_blocks(bare_bpe, documents, 99)[0]) == "The catsat"
    assert start_ids(minilm) == []
    assert [len(block) for block in text_blocks(bare_bpe, [Document("1", "9876")], 3)] == [3]


def test_too_little_text(tmp_path: Path, bpe: Any) -> None:
    (tmp_path / "tiny.txt").write_text("The cat")
    for held_out_fraction in (0.25, 0.0):
        config = TaskConfig(kind="lm", source=str(tmp_path / "tiny.txt"), held_out_fraction=held_out_fraction)
        with pytest.raises(GuilomoError, match=r"1 row.*too little text: shorten max_length = 256 or add text"):
            build_task(config, bpe)


def test_a_task_needs_shared_classes_and_two_of_them(
    write_jsonl: Callable[..., Path], rows_of: Makers, choice_folder: Path, bpe: Any
) -> None:
    with pytest.raises(GuilomoError, match="kind: causal_lm"):
        build_task(TaskConfig(source=str(choice_folder), name="quiz"), bpe)
    same = [rows_of["cls"](2 * i) for i in range(8)]
    with pytest.raises(GuilomoError, match=r"'even'.*at least two classes"):
        build_task(TaskConfig(source=str(write_jsonl("same.jsonl", same))), bpe)
    mixed = [rows_of["cls"](i) for i in range(8)]
    mixed[5] |= {"choices": ["odd", "even"], "label": 0}
    with pytest.raises(GuilomoError, match="share one list of label names"):
        build_task(TaskConfig(source=str(write_jsonl("mixed.jsonl", mixed))), bpe)


def test_the_hash_follows_the_content(toy_folder: Path, bpe: Any, minilm: Any) -> None:
    config = TaskConfig(source=str(toy_folder), name="toy")
    first = build_task(config, bpe).data_hash
    assert first == build_task(config, minilm).data_hash
    assert first != build_task(config.model_copy(update={"seed": 5}), bpe).data_hash
    assert len(first) == 64


def test_padding_width(toy_folder: Path, minilm: Any) -> None:
    task = build_task(TaskConfig(source=str(toy_folder), name="toy", max_length=12), minilm)
    rows = [{"input_ids": [1] * size, "attention_mask": [1] * size, "labels": 0} for size in (3, 9)]
    assert task.collate(rows)["input_ids"].shape == (2, 12)
    assert task.collate(rows[:1])["input_ids"].shape == (1, 8)
    batch = task.collate(rows)
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert set(batch["input_ids"][0, 3:].tolist()) == {minilm.pad_token_id}
    assert batch["labels"].tolist() == [0, 0]


def test_row_loss_of_classes() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.bfloat16)
    loss, count = row_loss(logits, torch.tensor([0, 0]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, -logits.float().log_softmax(1)[:, 0])
    assert count.tolist() == [1, 1]


def test_row_loss_of_tokens_shifts_and_skips() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.tensor([[3, -100, 2, 6, -100], [-100] * 5])
    loss, count = row_loss(logits, labels)
    expected = -(logits[0, 1].log_softmax(0)[2] + logits[0, 2].log_softmax(0)[6])
    torch.testing.assert_close(loss, torch.stack([expected, torch.tensor(0.0)]))
    assert count.tolist() == [2, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0, 1].abs().max() > 0
    assert gradient[1].abs().max() == 0
    assert gradient[0, 4].abs().max() == 0


@pytest.mark.parametrize("name", ["cola", "mrpc", "rte", "sst2"])
def test_shared_classification_data(data_dir: Path, minilm: Any, name: str) -> None:
    task = build_task(TaskConfig(source="$GUILOMO_DATA/nlp", name=name, train_size=200, test_size=100), minilm)
    assert task.num_labels == 2
    assert [len(task.rows(split)) for split in ("train", "held_out", "test")] == [150, 50, 100]
    assert (task.examples["train"][0].input2 is not None) == (name in ("mrpc", "rte"))


@pytest.mark.parametrize("name", ["gsm8k", "scienceqa_text", "openbookqa", "commonsenseqa"])
def test_shared_question_data(data_dir: Path, bpe: Any, name: str) -> None:
    config = TaskConfig(kind="causal_lm", source="$GUILOMO_DATA/nlp", name=name, max_length=1500)
    task: Task = build_task(config, bpe)
    assert len(task.test) in (500, 360)
    for row, example in zip(task.test[:20], task.examples["test"], strict=False):
        assert _answer(row, bpe) == f" {example.target or example.answer}</s>"


def test_shared_text(data_dir: Path, bpe: Any) -> None:
    task = build_task(TaskConfig(kind="lm", source="$GUILOMO_DATA/text/tinystories_sample.txt.xz"), bpe)
    assert len(task.train) > len(task.test) > 10
