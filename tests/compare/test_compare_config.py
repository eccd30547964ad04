"""What a comparison's file may say, and what is said about one that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guilomo.compare import CompareConfig
from guilomo.compare.config import task_from
from guilomo.errors import GuilomoError
from guilomo.run.config import RATES
from guilomo.run.recipe import load_config
from tiny_runs import write_recipe

SMALL: dict[str, Any] = {"tasks": ["docstrings"], "methods": ["guilomo", "lora"]}


def load(content: dict[str, Any], tmp_path: Path, *overrides: str) -> CompareConfig:
    return load_config(CompareConfig, write_recipe(tmp_path / "c.yaml", content), overrides)


def test_defaults_are_fair(tmp_path: Path) -> None:
    config = load(SMALL, tmp_path)
    assert config.seeds == [0, 1, 2]
    assert config.sweep.learning_rates == RATES
    assert not config.train.use_held_out
    assert config.folder == Path("comparisons/comparison")
    assert not config.reference_added
    assert CompareConfig.model_validate(config.model_dump(mode="json")) == config


def test_train_keys_do_not_bring_the_held_out_rows_back(tmp_path: Path) -> None:
    assert not load({**SMALL, "train": {"epochs": 1}}, tmp_path).train.use_held_out


def test_plain_lora_is_added(tmp_path: Path) -> None:
    config = load({**SMALL, "methods": ["uniform"]}, tmp_path)
    assert [method.name for method in config.methods] == ["lora", "uniform"]
    assert config.reference_added
    assert config.reference.name == "lora"
    named = load({**SMALL, "methods": [{"name": "plain", "strategy": "lora"}, "uniform"]}, tmp_path)
    assert named.reference.name == "plain"
    assert not named.reference_added


def test_a_task_can_differ(tmp_path: Path) -> None:
    task = {"name": "short", "source": "docstrings", "train": {"epochs": 1}, "budget": {"rank": 3}}
    config = load({**SMALL, "tasks": [task, "docstrings"], "train": {"batch_size": 5}}, tmp_path)
    short, rest = (config.run_config(task) for task in config.tasks)
    assert (short.train.epochs, short.train.batch_size, short.budget.rank) == (1, 5, 3)
    assert (rest.train.epochs, rest.train.batch_size, rest.budget.rank) == (3, 5, 2)
    assert short.folder == config.folder / "tasks" / "short"


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("docstrings", {"name": "docstrings", "source": "docstrings"}),
        ("rows/cola.train.jsonl.gz", {"name": "cola", "source": "rows/cola.train.jsonl.gz"}),
        ("novel.txt", {"name": "novel", "source": "novel.txt", "kind": "lm"}),
        ("$GUILOMO_DATA/nlp/cola", {"name": "cola", "source": "$GUILOMO_DATA/nlp"}),
        ("hub:nyu/glue", {"name": "glue", "source": "hub:nyu/glue"}),
    ],
)
def test_a_task_can_be_one_word(text: str, keys: dict[str, Any]) -> None:
    assert task_from(text) == keys


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": ["docstrings", "docstrings"]}, r"tasks has entries of the same name"),
        ({"tasks": []}, r"tasks = \[\] is not usable"),
        ({"tasks": [{"name": "a b"}]}, r"tasks\.0\.name: name = 'a b' is not usable"),
        ({"tasks": [{"name": "a", "sorce": "x"}]}, r"tasks\.0\.sorce is not a known key.*Did you mean 'source'"),
        ({"tasks": [{"name": "a", "train": {"epocs": 1}}]}, r"task 'a': train\.epocs is not a known key.*'epochs'"),
        ({"methods": ["lora", "lora"]}, r"methods has rows of the same name"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\] has repeats"),
        ({"metods": []}, r"metods is not a known key.*Did you mean 'methods'"),
        ({"train": {"use_held_out": True}}, r"task 'docstrings': sweep\.learning_rates chooses by the held-out loss"),
        ({"evaluation": {"metric": "perplexity"}}, r"evaluation\.metric = 'perplexity' does not fit"),
    ],
)
def test_what_cannot_be_used_is_explained(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(GuilomoError, match=said):
        load({**SMALL, **changes}, tmp_path)


def test_overrides_reach_everything(tmp_path: Path) -> None:
    config = load(SMALL, tmp_path, "tasks.0={name: d, source: docstrings, max_length: 9}", "seeds=[5]", "budget.rank=7")
    assert config.tasks[0].task().max_length == 9
    assert config.seeds == [5]
    assert config.run_config(config.tasks[0]).budget.rank == 7


def test_missing_keys_are_named() -> None:
    with pytest.raises(GuilomoError, match=r"tasks is missing\. Give it.*\nmethods is missing"):
        load_config(CompareConfig, None)
