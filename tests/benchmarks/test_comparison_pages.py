"""docs/family.md shows what the committed results say, and what it says of a comparison."""

from __future__ import annotations

import json
from typing import Any

import pytest

from absolute_paths import absolute_paths
from benchmarks import family_page
from benchmarks.recipe_results import results_in

FOUND = results_in("comparisons")


def test_the_page_is_made_of_the_committed_results() -> None:
    assert family_page.PAGE.read_text(encoding="utf-8") == family_page.page(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_results_are_whole_and_name_no_machine(name: str) -> None:
    found = FOUND[name]
    assert found["status"] == "complete"
    assert found["failures"] == []
    assert len(found["seeds"]) >= 3
    assert absolute_paths(json.dumps(found)) == []


@pytest.mark.parametrize("name", FOUND)
def test_every_mean_is_that_of_its_cells(name: str) -> None:
    for method in FOUND[name]["methods"]:
        for task, entry in method["tasks"].items():
            values = [cell["value"] for cell in entry["cells"]]
            assert entry["mean"] == pytest.approx(sum(values) / len(values)), (method["name"], task)


@pytest.mark.parametrize("name", FOUND)
def test_all_rows_are_of_one_budget(name: str) -> None:
    budgets = {task["name"]: task["budget"] for task in FOUND[name]["tasks"]}
    for method in FOUND[name]["methods"]:
        for task, entry in method["tasks"].items():
            assert entry["parameters"] <= budgets[task], (method["name"], task)


def test_the_words_above_the_tables_are_those_of_the_tests() -> None:
    found = FOUND["family-minilm"]
    sure = {(t["task"], t["metric"], t["difference"] > 0): set() for t in found["tests"]}
    for test in found["tests"]:
        if test["p_corrected"] < 0.05:
            sure[test["task"], test["metric"], test["difference"] > 0].add(test["method"])
    assert {key: names for key, names in sure.items() if names} == {
        ("sst2", "loss", False): {"uniform", "guilomo", "ld_mole", "adamole", "ssr", "mixlora"},
        ("docstrings", "accuracy", True): {"flylora"},
        ("docstrings", "loss", True): {"adamole", "lora_mixer"},
    }
    assert found["friedman"]["p"] > 0.05
    leads = {t["method"]: t["difference"] for t in found["tests"] if (t["task"], t["metric"]) == ("sst2", "loss")}
    assert leads["uniform"] < leads["guilomo"] < 0
    assert in_loss("options-stories", "scienceqa_text")[1] >= {"meteora", "rocket", "perplexity", "drawn", "xlora"}
    assert in_loss("novels-stories", "novels") == (set(), {"meteora", "drawn", "xlora"})


def in_loss(name: str, task: str) -> tuple[set[str], set[str]]:
    """The methods that are better, and those that are worse, than plain LoRA in loss beyond noise."""
    found = [t for t in FOUND[name]["tests"] if (t["task"], t["metric"]) == (task, "loss") and t["p_corrected"] < 0.05]
    better, worse = ({t["method"] for t in found if (t["difference"] < 0) is won} for won in (True, False))
    return better, worse


def test_the_words_about_several_tasks_are_those_of_the_tests() -> None:
    hard = {"lora_mixer", "lora_mixer_half"}
    assert in_loss("mixed-stories", "texts") == ({"uniform", "loramoe", "loramoe_even"}, hard)
    means = {m["name"]: m["tasks"]["texts"]["mean"] for m in FOUND["mixed-stories"]["methods"]}
    assert min(means, key=means.__getitem__) == "moelora"
    assert means["lora_mixer_soft"] < means["lora_mixer_half"] < means["lora_mixer"]
    assert in_loss("mixed-minilm", "sst2+docstrings") == ({"moelora"}, {"lora_mixer"})
    assert FOUND["mixed-minilm"]["tasks"][0]["above_chance"] is False


def test_the_words_about_full_experts_are_those_of_the_tests() -> None:
    low = {"flexmore-1", "flexmore-4"}
    assert in_loss("flexmore-stories", "novels") == (set(), low)
    routers = {*low, "flexmore-16", "flexmore-effective", "flexmore-full"}
    assert in_loss("flexmore-stories", "scienceqa_text") == (set(), routers)
    methods = {m["name"]: m["tasks"]["novels"] for m in FOUND["flexmore-stories"]["methods"]}
    assert {methods[name]["parameters"] for name in routers} == {1280}
    ranks = [methods[f"flexmore-{rank}"]["mean"] for rank in ("1", "4", "16", "full")]
    assert ranks == sorted(ranks, reverse=True)
    kept = {r for m in methods["flexmore-effective"]["allocation"]["modules"].values() for r in m["ranks"]} - {0}
    assert (min(kept), max(kept)) == (52, 60)


def test_a_cell_says_what_is_beyond_noise_and_what_is_missing() -> None:
    cell: dict[str, Any] = {"value": "81.0 %", "interval": "[78, 84]", "outcome": "better", "alarm": "", "missing": ""}
    assert family_page._cell(cell) == "**better** 81.0 % [78, 84]"
    assert family_page._cell({**cell, "outcome": "even", "alarm": "1 of 3 seeds failed"}).endswith("seeds failed")
