"""Scoring: batching and padding change nothing, options and generation agree with naive loops."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from guilomo.errors import GuilomoError
from guilomo.evaluation import evaluate
from guilomo.evaluation.answers import final_number, is_right, normalise
from guilomo.evaluation.forward import batches_by_length, evaluating
from guilomo.evaluation.generation import generate_answers
from guilomo.evaluation.options import score_options
from guilomo.tasks import Example, Task
from guilomo.tasks.templates import render_prompt, resolve_template


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to what another order of float32 additions can change."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_classification(make_task: Any, classifier: Any) -> None:
    task: Task = make_task("cls", "classification")
    found = evaluate(classifier, task, batch_size=4)
    assert set(found.metrics) == {"loss", "accuracy", "f1", "matthews"}
    assert found.ids == [example.id for example in task.examples["test"]]
    classifier.eval()
    for index, row in enumerate(task.test):
        with torch.no_grad():
            logits = classifier(torch.tensor([row["input_ids"]])).logits
        loss = functional.cross_entropy(logits, torch.tensor([row["labels"]]))
        assert_near(torch.tensor(found.row_loss[index]), loss)
        assert found.predictions is not None
        assert found.predictions[index] == int(logits.argmax())
        assert found.hits["accuracy"][index] == (found.predictions[index] == row["labels"])
    assert found.metrics["accuracy"].value == pytest.approx(sum(found.hits["accuracy"]) / 17)
    assert found.row_tokens == [1] * 17


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_size_changes_nothing(make_task: Any, causal: Any, batch_size: int) -> None:
    task: Task = make_task("mc", "causal_lm")
    found, reference = evaluate(causal, task, batch_size=batch_size), evaluate(causal, task, batch_size=7)
    assert_near(torch.tensor(found.row_loss), torch.tensor(reference.row_loss))
    assert found.predictions == reference.predictions
    assert found.row_tokens == reference.row_tokens


def test_perplexity_of_text_by_hand(text_task: Task, causal: Any) -> None:
    found = evaluate(causal, text_task, batch_size=3)
    total, count = 0.0, 0
    for row in text_task.test:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            scores = causal.eval()(ids).logits[0].log_softmax(-1)
        for place in range(ids.shape[1] - 1):
            total -= float(scores[place, ids[0, place + 1]])
            count += 1
    assert sum(found.row_tokens) == count
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.metrics["loss"].value == pytest.approx(total / count, rel=1e-4)
    assert found.predictions is None
    assert found.hits == {}


def _option_log_likelihood(model: Any, task: Task, example: Example, choice: str) -> float:
    """The obvious way: one option, no padding, one token after the other."""
    tokenizer: Any = task.tokenizer
    prompt = tokenizer(render_prompt(resolve_template("plain"), example))["input_ids"]
    option = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
    total = 0.0
    for place, token in enumerate(option):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + option[:place]])).logits
        total += float(logits[0, -1].log_softmax(-1)[token])
    return total


def test_options_against_a_naive_loop(make_task: Any, causal: Any) -> None:
    task: Task = make_task("mc", "causal_lm")
    examples = task.examples["test"]
    with evaluating(causal):
        found = score_options(causal, task, examples, batch_size=6)
        naive = [[_option_log_likelihood(causal, task, e, c) for c in e.choices or ()] for e in examples]
    for row, expected, example, by_sum, by_character in zip(
        found.log_likelihoods, naive, examples, found.by_sum, found.by_character, strict=True
    ):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert by_sum == expected.index(max(expected))
        shares = [value / len(choice) for value, choice in zip(expected, example.choices or (), strict=True)]
        assert by_character == shares.index(max(shares))
    result = evaluate(causal, task)
    assert result.predictions == found.by_sum
    guesses = {"accuracy": found.by_sum, "accuracy_per_character": found.by_character}
    for name, guessed in guesses.items():
        assert result.hits[name] == [e.label == guess for e, guess in zip(examples, guessed, strict=True)]
        assert result.metrics[name].value == sum(result.hits[name]) / len(examples)
    assert result.hits["accuracy"] != result.hits["accuracy_per_character"]
    assert set(result.metrics) == {"loss", "perplexity", "accuracy", "accuracy_per_character"}


def test_a_repeated_option_counts_by_its_words(make_task: Any, causal: Any) -> None:
    task: Task = make_task("mc", "causal_lm")
    same = [
        Example(**{**example.__dict__, "choices": ("no", "no"), "label": 1, "answer": "no"})
        for example in task.examples["test"]
    ]
    task.examples["test"] = same
    assert evaluate(causal, task).metrics["accuracy"].value == 1.0


def test_class_names_as_answers_also_get_f1(make_task: Any, causal: Any) -> None:
    found = evaluate(causal, make_task("cls", "causal_lm"))
    assert {"accuracy", "accuracy_per_character", "f1", "matthews"} <= set(found.metrics)


def _naive_greedy(model: Any, task: Task, example: Example, limit: int) -> str:
    tokenizer: Any = task.tokenizer
    ids = tokenizer(render_prompt(resolve_template("plain"), example))["input_ids"]
    start = len(ids)
    while len(ids) - start < limit:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_generation_against_naive_greedy(make_task: Any, causal: Any) -> None:
    task: Task = make_task("gen", "causal_lm")
    # A checkpoint that asks for sampling and penalties must not get them.
    causal.generation_config.do_sample = True
    causal.generation_config.temperature = 3.0
    causal.generation_config.repetition_penalty = 5.0
    examples = task.examples["test"]
    with evaluating(causal):
        found = generate_answers(causal, task, examples, batch_size=5, max_new_tokens=9)
        expected = [_naive_greedy(causal, task, example, 9) for example in examples]
    assert found == expected
    assert len(set(found)) > 3


def test_generation_stops_at_every_end_token(make_task: Any, causal: Any) -> None:
    task: Task = make_task("gen", "causal_lm")
    with evaluating(causal):
        example = task.examples["test"][0]
        ids: Any = task.tokenizer(render_prompt(resolve_template("plain"), example))["input_ids"]
        first = int(causal(torch.tensor([ids])).logits[0, -1].argmax())
        free = generate_answers(causal, task, [example], 1, max_new_tokens=12)
        causal.generation_config.eos_token_id = [2, first]
        stopped = generate_answers(causal, task, [example], 1, max_new_tokens=12)
    assert len(free[0]) > 3
    assert stopped[0] == task.tokenizer.decode([first], skip_special_tokens=True)


def test_exact_match(make_task: Any, causal: Any) -> None:
    task: Task = make_task("gen", "causal_lm")
    found = evaluate(causal, task, generate=True, max_new_tokens=4)
    assert found.metrics["exact_match"].value == 0.0
    assert found.generated == found.predictions
    assert len(found.generated or []) == 17
    quiz: Task = make_task("mc", "causal_lm")
    both = evaluate(causal, quiz, generate=True, max_new_tokens=4)
    assert isinstance((both.predictions or [""])[0], int)
    assert both.generated is not None
    assert set(both.hits) == {"accuracy", "accuracy_per_character", "exact_match"}
    for name, hits in both.hits.items():
        assert both.metrics[name].value == pytest.approx(sum(hits) / 17)
    words = zip(both.generated, quiz.examples["test"], strict=True)
    assert both.hits["exact_match"] == [is_right(text, f" {example.answer}") for text, example in words]
    quiet = evaluate(causal, task)
    assert set(quiet.metrics) == {"loss", "perplexity"}
    assert quiet.hits == {}


@pytest.mark.parametrize(
    ("generated", "reference", "right"),
    [
        (" Red.", " red", True),
        (" red\nand more", " red", True),
        (" red and more", " red", False),
        ("steps\n#### 1,234", " other steps\n#### 1234", True),
        ("#### $12.50.", " #### 12.5", True),
        ("1234", " #### 1234", False),
        ("#### many", " #### 1234", False),
        ("####", " #### 1234", False),
        ("#### NaN", " #### NaN", False),
        ("two\nlines", " Two\nlines", True),
        ("two", " Two\nlines", False),
    ],
)
def test_answers(generated: str, reference: str, right: bool) -> None:
    assert is_right(generated, reference) is right


def test_normalisation_is_what_it_says() -> None:
    assert normalise("  'A   Cat!'\nnext", all_lines=False) == "a cat"
    assert final_number("#### 3 then #### -7%") == -7


def test_training_flags_gradients_and_progress(make_task: Any, classifier: Any) -> None:
    classifier.train()
    classifier.bert.encoder.eval()
    before = [module.training for module in classifier.modules()]
    calls: list[tuple[int, int]] = []
    evaluate(classifier, make_task("cls", "classification"), batch_size=8, progress=lambda *a: calls.append(a))
    assert [module.training for module in classifier.modules()] == before
    assert calls == [(8, 17), (16, 17), (17, 17)]
    assert all(parameter.grad is None for parameter in classifier.parameters())
    with pytest.raises(RuntimeError, match="stop"), evaluating(classifier):
        raise RuntimeError("stop")
    assert [module.training for module in classifier.modules()] == before


def test_the_result_is_plain_data(make_task: Any, causal: Any) -> None:
    task: Task = make_task("mc", "causal_lm")
    found = evaluate(causal, task, split="held_out").to_dict()
    again = json.loads(json.dumps(found))
    assert again["data_hash"] == task.data_hash
    assert again["metrics"]["loss"]["n"] == len(task.held_out)
    assert again["split"] == "held_out"


def test_batches() -> None:
    assert batches_by_length([1, 5, 3, 5], 3) == [[1, 3, 2], [0]]
    with pytest.raises(GuilomoError, match="batch_size = 0"):
        batches_by_length([1], 0)


def test_bad_requests(make_task: Any, causal: Any, classifier: Any) -> None:
    task: Task = make_task("cls", "classification", held_out_fraction=0.0)
    with pytest.raises(GuilomoError, match="a split with rows"):
        evaluate(classifier, task, split="held_out")
    with pytest.raises(GuilomoError, match="Use kind: causal_lm"):
        evaluate(classifier, task, generate=True)
    with pytest.raises(GuilomoError, match="max_new_tokens = 0"):
        evaluate(causal, make_task("gen", "causal_lm"), generate=True, max_new_tokens=0)
    with pytest.raises(GuilomoError, match="max_length = 128"):
        evaluate(causal, make_task("gen", "causal_lm"), generate=True, max_new_tokens=128)
