"""Recipes: YAML and --set to a validated config, with messages that name key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from guilomo import LoraMoeConfig
from guilomo.errors import GuilomoError
from guilomo.run import Run, RunConfig, load_recipe
from guilomo.run.methods import router_cost
from tiny_runs import write_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid(path: Path) -> None:
    """Without the data or the model: nothing is loaded before a stage needs it."""
    config = load_recipe(path)
    assert Run(config).config.methods
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_there_are_recipes() -> None:
    assert RECIPES


def test_no_recipe_gives_the_defaults() -> None:
    assert load_recipe(None) == RunConfig()


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_recipe(tmp_path / "empty.yaml") == RunConfig()


@pytest.mark.parametrize(
    ("overrides", "read"),
    [
        (["search.steps=100"], lambda c: c.search.steps == 100),
        (["train.learning_rate=3e-4"], lambda c: c.train.learning_rate == 3e-4),
        (["mixture.balance_loss=null"], lambda c: c.mixture.balance_loss is None),
        (["mixture.target_modules=[query, value]"], lambda c: c.mixture.target_modules == ["query", "value"]),
        (["seeds=[1, 2, 3]"], lambda c: c.seeds == [1, 2, 3]),
        (["methods=[lora, uniform]"], lambda c: [m.name for m in c.methods] == ["lora", "uniform"]),
        (["methods.1.label=LoRA"], lambda c: c.methods[1].label == "LoRA"),
        (["methods.1.options.rank=4"], lambda c: c.methods[1].options == {"rank": 4}),
        (["methods.0={name: mola, options: {groups: [2, 4]}}"], lambda c: c.methods[0].options == {"groups": [2, 4]}),
        (["name=a=b"], lambda c: c.name == "a=b"),
        (["task.name="], lambda c: c.task.name is None),
        (["search.steps=100", "search.steps=50"], lambda c: c.search.steps == 50),
        (["train.epochs=0.5"], lambda c: c.train.epochs == 0.5),
        (
            ["sweep.learning_rates=[1e-3, 0.01]", "train.use_held_out=false"],
            lambda c: c.sweep.learning_rates[0] == 1e-3,
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_overrides(tmp_path: Path, overrides: list[str], read: Any) -> None:
    content = {"methods": ["uniform", {"name": "lora"}], "search": None, "train": {"epochs": 1}}
    path = write_recipe(tmp_path / "r.yaml", content | ({} if "search" in overrides[0] else {"search": {}}))
    assert read(load_recipe(path, overrides))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("search.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("seeds=[1, 2", "not a YAML value"),
        ("name.first=x", "'name' holds a single value"),
        ("methods.7.name=x", "the list has 2"),
        ("methods.first.name=x", "not the place of an item"),
        ("search.stepz=3", "Did you mean 'steps'"),
        ("search.steps=many", "search.steps = 'many' is not usable: input should be a valid integer"),
        ("search.steps=0", "search.steps = 0 is not usable: input should be greater than or equal to 1"),
        ("mixture.router=topp", "Did you mean 'top_p'"),
        ("mixture.target_modules=3", "mixture.target_modules = 3 is not usable: input should be a valid string, or"),
        ("search=3", "search = 3 is not usable: expected keys with values"),
        ("methods.0={label: x}", "methods.0.name is missing"),
        ("methods=[]", "methods"),
        ("seeds=[]", "seeds"),
        ("seeds=[1, 1]", "repeated seed"),
        ("methods=[lora, lora]", "same name"),
        ("search.top_k=3", "contradicts mixture.top_k = 2"),
        ("mixture.top_k=9", "max_experts = 4 is below top_k = 9"),
        ("evaluation.metric=acuracy", "Did you mean 'accuracy'"),
        ("task.kind=clasification", "Did you mean 'classification'"),
        ("mixture.router=topkk", "Did you mean 'topk'"),
        ("evaluation.metric=perplexity", "does not fit task.kind = 'classification'"),
        ("evaluation.metric=exact_match", "does not fit task.kind = 'classification'"),
        ("evaluation.generate=true", "contradicts task.kind = 'classification'"),
        ("search.warmup_steps=900", "Lower warmup_steps"),
        ("sweep.learning_rates=[0.1]", "at least 2 different rates"),
        ("sweep.learning_rates=[0.1, 0.1]", "at least 2 different rates"),
        ("sweep.learning_rates=[0.1, -1]", "finite numbers above 0"),
        ("sweep.learning_rates=[0.1, .inf]", "finite numbers above 0"),
        ("sweep.learning_rates=[0.1, 0.2]", "Set train.use_held_out to false"),
    ],
)
def test_bad_overrides_say_what_is_wrong(tmp_path: Path, override: str, says: str) -> None:
    content = {"name": "x", "methods": ["uniform", {"name": "lora"}], "mixture": {"top_k": 2}, "search": {}}
    with pytest.raises(GuilomoError) as caught:
        load_recipe(write_recipe(tmp_path / "r.yaml", content), [override])
    assert says in str(caught.value)
    assert "str is not" not in str(caught.value)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "exact_match"])
def test_plain_text_has_no_right_answers(metric: str) -> None:
    with pytest.raises(GuilomoError, match=r"does not fit task\.kind = 'lm': expected one of loss, perplexity"):
        load_recipe(None, ["task.kind=lm", f"evaluation.metric={metric}"])


def test_exact_match_needs_generated_answers() -> None:
    overrides = ["task.kind=causal_lm", "evaluation.metric=exact_match"]
    with pytest.raises(GuilomoError, match=r"Set evaluation\.generate to true"):
        load_recipe(None, overrides)
    assert load_recipe(None, [*overrides, "evaluation.generate=true"])


def test_all_problems_are_listed_with_the_file(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", {"modell": {}, "train": {"epochs": -1}, "task": {"kind": "clasification"}})
    with pytest.raises(GuilomoError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert str(path) in text
    for part in ("Did you mean 'model'?", "train.epochs = -1", "task.kind = 'clasification'", "'causal_lm'"):
        assert part in text


@pytest.mark.parametrize("keys", [("train", "epoch"), ("task", "sorce"), ("mixture", "topk"), ("budget", "parameter")])
def test_an_unknown_key_names_the_nearest(keys: tuple[str, str]) -> None:
    with pytest.raises(GuilomoError, match=rf"{keys[0]}\.{keys[1]} is not a known key.*Did you mean"):
        load_recipe(None, [f"{keys[0]}.{keys[1]}=1"])


def test_an_unknown_strategy_names_the_nearest(tmp_path: Path) -> None:
    config = load_recipe(None, ["methods=[{name: mine, strategy: unifrom}]"])
    with pytest.raises(GuilomoError, match=r"'unifrom'.*Did you mean 'uniform'"):
        Run(config)


def test_options_of_the_searched_method_belong_to_the_search() -> None:
    config = load_recipe(None, ["methods=[{name: guilomo, options: {relaxation: prefix}}]"])
    with pytest.raises(GuilomoError, match="keys under search"):
        Run(config)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    write_recipe(tmp_path / "demo.yaml", {})
    with pytest.raises(GuilomoError, match=r"no recipe at .*dmo\.yaml\. Did you mean .*demo\.yaml"):
        load_recipe(tmp_path / "dmo.yaml")
    with pytest.raises(GuilomoError, match="no recipe at"):
        load_recipe(tmp_path)
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2\nb: }")
    with pytest.raises(GuilomoError, match="not readable as YAML"):
        load_recipe(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GuilomoError, match="not readable as YAML"):
        load_recipe(bad)
    bad.write_text(yaml.safe_dump([1, 2]))
    with pytest.raises(GuilomoError, match="holds a list"):
        load_recipe(bad)


def test_the_searchs_top_k_is_the_mixtures() -> None:
    config = load_recipe(None, ["mixture.top_k=1", "search.max_experts=1"])
    assert config.search.top_k == 1


def test_routers_and_their_options_come_from_the_recipe() -> None:
    mixture = {"router": "sparsegen", "router_options": {"hidden": 4}, "router_loss_coefficient": 0.1}
    config = RunConfig(mixture=mixture, methods=["uniform"])
    made = LoraMoeConfig(**config.mixture.peft_options())
    assert (made.router, made.router_options, made.router_loss_coefficient) == ("sparsegen", {"hidden": 4}, 0.1)
    assert router_cost(config).options["hidden"] == 4


@pytest.mark.parametrize(
    ("mixture", "says"),
    [
        ({"router": "sparsegen"}, r"router = 'sparsegen' is not usable in a search.*topk, dense, fixed"),
        ({"router_options": {"hidden": 4}}, r"router_options name = 'hidden'"),
        ({"balance_loss": "swich"}, r"Did you mean 'switch'"),
        ({"router": "dense", "router_loss_coefficient": 0.1}, r"no loss of its own"),
    ],
)
def test_routers_that_cannot_work_are_refused_before_anything_is_loaded(mixture: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RunConfig(mixture=mixture, methods=["guilomo", "uniform"])
