"""The recipe of every method: the same run as its name alone, written out to be edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guilomo.cli import main
from guilomo.layers.balance import balance_options
from guilomo.layers.routers import router_options
from guilomo.methods import METHODS
from guilomo.run import Run, RunConfig
from guilomo.run.config import PLAIN_LORA, RATES, MixtureConfig
from guilomo.run.files import read_json
from guilomo.run.method_recipe import FAIR, WIDTH, method_recipe
from guilomo.run.methods import FROM_SEARCH, check_methods
from guilomo.run.recipe import load_config

# What a row needs may be a file, of which there is only an example.
PLANNED = [name for name in METHODS if name not in FROM_SEARCH and METHODS[name].needs.keys() <= {"rules"}]


@pytest.fixture
def printed(tmp_path: Path) -> Callable[..., RunConfig]:
    """`printed(name, *overrides)` -> the recipe of a method, read from its file."""

    def read(name: str, *overrides: str) -> RunConfig:
        file = tmp_path / f"{name}.yaml"
        file.write_text(method_recipe(name), encoding="utf-8")
        return load_config(RunConfig, file, overrides)

    return read


def plain(name: str, *overrides: str) -> RunConfig:
    """What a run is given the names alone, and what such a row cannot do without."""
    row = {"name": name, "options": METHODS[name].needs}
    rows = [row] if name == PLAIN_LORA else [PLAIN_LORA, row]
    return load_config(RunConfig, None, [f"name=try-{name}", f"methods={json.dumps(rows)}", *overrides])


def completed(mixture: MixtureConfig) -> dict[str, Any]:
    """A mixture with all options of its router and balance loss, whether they were given or not."""
    options = {
        "router_options": router_options(mixture.router, mixture.router_options),
        "balance_options": balance_options(mixture.balance_loss, mixture.balance_options),
    }
    return {**mixture.model_dump(), **options}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_run_of_the_name_alone(name: str, printed: Callable[..., RunConfig]) -> None:
    config, alone = printed(name), plain(name)
    if not METHODS[name].starts_from:  # of that there is only an example
        check_methods(config)
    assert config.model_dump(exclude={"methods"}) == alone.model_dump(exclude={"methods"})
    assert [row.label for row in config.methods] == [row.label for row in alone.methods]
    for row, other in zip(config.methods, alone.methods, strict=True):
        assert completed(config.mixture_of(row)) == completed(alone.mixture_of(other))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("name", PLANNED)
def test_it_has_the_plan_of_the_name_alone(
    name: str, printed: Callable[..., RunConfig], colour_recipe: Callable[..., dict[str, Any]]
) -> None:
    tiny = colour_recipe(budget={"experts": 4, "rank": 6})
    changes = [f"{key}={json.dumps(tiny[key])}" for key in ("model", "task", "budget")]
    assert Run(printed(name, *changes)).facts["plans"] == Run(plain(name, *changes)).facts["plans"]


@pytest.mark.parametrize("name", METHODS)
def test_it_writes_out_what_makes_the_method(name: str, printed: Callable[..., RunConfig]) -> None:
    row = printed(name).methods[-1]
    assert row.mixture.keys() >= METHODS[name].mixture.keys()
    assert row.options.items() >= METHODS[name].needs.items()
    text = method_recipe(name)
    assert all(len(line) <= WIDTH for line in text.splitlines())
    header = " ".join(line.removeprefix("# ").strip() for line in text.partition("\nname:")[0].splitlines())
    method = METHODS[name]
    for part in (method.label, method.summary, method.paper, method.maturity, method.note, method.knobs):
        assert part in header


def test_options_have_their_values(printed: Callable[..., RunConfig]) -> None:
    assert printed("ld_mole").methods[-1].mixture["router_options"] == {"hidden": 8, "target": 2}
    assert printed("hmora").methods[-1].mixture["balance_options"] == {"balanced": 0.98, "certain": 0.5}
    assert printed("alphalora").methods[-1].options["beta"] == 2.5
    assert "top_k" not in printed("smora").methods[-1].mixture
    assert "K is 1/8 of them, at least 2; alpha is divided by K." in method_recipe("smora")
    assert "relaxation: survival" in method_recipe("guilomo")


@pytest.mark.parametrize("name", ["ld_mole", "guilomo"])
def test_the_lines_of_a_fair_comparison_are_of_the_recipe(name: str, tmp_path: Path) -> None:
    recipe, says, lines = method_recipe(name).partition(FAIR + "\n")
    assert says
    file = tmp_path / "fair.yaml"
    file.write_text(recipe + "".join(line.removeprefix("# ") for line in lines.splitlines(keepends=True)))
    config = load_config(RunConfig, file)
    assert (config.seeds, config.sweep.learning_rates, config.train.use_held_out) == ([0, 1, 2], RATES, False)
    assert config.search_per_seed == (name == "guilomo")


def test_it_runs_as_it_is_printed(
    tmp_path: Path, colour_recipe: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", "ld_mole", "--recipe"]) == 0
    file = tmp_path / "ld_mole.yaml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    tiny = colour_recipe(budget={"experts": 4, "rank": 6})
    changes = [f"{key}={json.dumps(tiny[key])}" for key in ("model", "task", "budget", "train", "output")]
    assert main(["run", str(file), "--quiet", *(part for change in changes for part in ("--set", change))]) == 0
    results = read_json(tmp_path / "run" / "results.json")
    assert [row["name"] for row in results["methods"]] == ["lora", "ld_mole"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ldmole"], "Did you mean 'ld_mole'?"),
        (["ld_mole", "--json"], "--recipe prints YAML and --json prints JSON."),
        ([], "expected one method."),
        (["ld_mole", "smora"], "expected one method."),
    ],
)
def test_refusals(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", *arguments, "--recipe"]) == 2
    answer = capsys.readouterr()
    assert says in answer.err
    assert not answer.out


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].mixed])
def test_it_says_what_is_different_with_several_tasks(name: str) -> None:
    """In a comment, which is true of the run of two parts."""
    text = " ".join(method_recipe(name).replace("#", " ").split())
    config = load_config(RunConfig, None, [f"methods=[{name}]", "task.parts=[docstrings, other.jsonl]"])
    mixture = config.mixture_of(config.methods[0])
    for field in METHODS[name].mixed:
        value = json.dumps(getattr(mixture, field)).replace('"', "")
        assert f"{field}: {value}" in text, field
