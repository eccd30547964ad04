"""The whole job: every method at one budget, scored, compared and reported; the same numbers every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from guilomo.allocation import Allocation, shuffled
from guilomo.errors import GuilomoError
from guilomo.evaluation import evaluate
from guilomo.run import Run
from guilomo.run.files import read_json
from guilomo.run.methods import attach
from tiny_runs import config_of, recipe, run_of, without_times

METHODS = ["guilomo", "lora", "uniform", "mola", "random", "shuffled", "normal", "alphalora"]
PARTS = {
    "schema",
    "guilomo",
    "name",
    "command",
    "created",
    "status",
    "versions",
    "hardware",
    "seconds",
    "config",
    "data",
    "model",
    "budget",
    "search",
    "methods",
    "tests",
    "primary_metric",
    "verdict",
}


@pytest.fixture(scope="module")
def finished(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A complete classification run of all methods with two seeds; read only."""
    task = {"kind": "classification", "source": str(colours), "name": "colours"}
    folder = tmp_path_factory.mktemp("finished")
    job = run_of(recipe(bert_folder, task, folder, methods=METHODS, seeds=[0, 3]))
    job.prepare(resume=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guilomo.run.pipeline.write_report", lambda results, path: None)
        job.all()
    return job


@pytest.fixture(scope="module")
def results(finished: Run) -> dict[str, Any]:
    found: dict[str, Any] = read_json(finished.config.folder / "results.json")
    return found


def result_of(job: Run, method: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = read_json(job.config.folder / "methods" / method / f"seed-{seed}" / "result.json")
    return found


def test_results_have_every_part(results: dict[str, Any]) -> None:
    assert set(results) == PARTS
    assert results["status"] == "complete"
    assert [m["name"] for m in results["methods"]] == METHODS
    assert [m["kind"] for m in results["methods"]] == ["searched", "baseline", *["control"] * 6]
    assert results["primary_metric"] == "accuracy"
    assert results["data"]["sizes"] == {"train": 36, "held_out": 12, "test": 20}
    assert results["search"]["steps"] == 6
    assert {t["metric"] for t in results["tests"]} == {"loss", "accuracy"}
    assert {t["b"] for t in results["tests"]} == set(METHODS) - {"guilomo"}
    assert results["verdict"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_its_runs(results: dict[str, Any], name: str) -> None:
    method = next(m for m in results["methods"] if m["name"] == name)
    assert [r["seed"] for r in method["runs"]] == [0, 3]
    for one in method["runs"]:
        assert set(one) >= {"metrics", "train_seconds", "step_seconds", "loss_curve", "router"}
        assert [step for step, _ in one["loss_curve"]] == [2, 4, 5]
        assert (one["router"] is None) == (name == "lora")
    values = [r["metrics"]["loss"]["value"] for r in method["runs"]]
    assert method["summary"]["loss"]["mean"] == pytest.approx(sum(values) / 2)
    assert method["summary"]["loss"]["seeds"] == 2


@pytest.mark.parametrize("name", METHODS)
def test_each_plan_is_just_below_the_budget(finished: Run, results: dict[str, Any], name: str) -> None:
    """Counted on the attached model: everything trainable that the pretrained model did not have, heads apart."""
    method = next(m for m in finished.config.methods if m.name == name)
    folder = finished.config.folder / "methods" / name
    plan = Allocation.load(folder / "seed-0" / "allocation.json")
    model = attach(finished.fresh_model(0), plan, method, finished.config, finished.task)
    count = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n)
    row = next(m for m in results["methods"] if m["name"] == name)
    assert count == plan.parameters(finished.router_cost)
    # The random control has a plan for every seed; its row gives the largest.
    assert count <= row["parameters"] if name == "random" else count == row["parameters"]
    budget = results["budget"]["parameters"]
    assert 0.99 * budget <= count <= budget


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_adapter_scores_what_was_written(finished: Run, name: str) -> None:
    written = result_of(finished, name, 3)
    folder = finished.config.folder / "methods" / name / "seed-3" / "adapter"
    model = PeftModel.from_pretrained(finished.fresh_model(7), str(folder))
    scored = evaluate(model, finished.task, batch_size=finished.config.evaluation.batch_size).to_dict()
    assert scored["metrics"] == written["metrics"]
    assert scored["row_loss"] == written["rows"]["row_loss"]


def test_the_uniform_row_is_the_plan_that_sets_the_budget(results: dict[str, Any]) -> None:
    uniform = next(m for m in results["methods"] if m["name"] == "uniform")
    assert uniform["parameters"] == results["budget"]["parameters"]
    assert {tuple(m["ranks"]) for m in uniform["allocation"]["modules"].values()} == {(4, 4, 4, 4)}


@pytest.mark.parametrize("scaling", ["alpha_over_r", "alpha_over_sqrt_r", "constant"])
def test_plain_lora_is_pefts_with_the_plans_ranks_and_scales(colour_recipe: Any, scaling: str) -> None:
    job = run_of(colour_recipe(methods=["lora"], mixture={"scaling": scaling, "alpha": 12.0}))
    method = job.config.methods[0]
    plan = job.plan(method, 0)
    model = attach(job.fresh_model(0), plan, method, job.config, job.task)
    assert model.peft_config["default"].peft_type == "LORA"
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(plan.adapted())
    for name, layer in layers.items():
        assert layer.r["default"] == plan[name].rank
        assert layer.scaling["default"] == pytest.approx(plan.scales(name)[0], rel=1e-12)


def test_the_page_is_there(finished: Run, real_page: None) -> None:
    finished.write_results()
    page = (finished.config.folder / "report.html").read_text(encoding="utf-8")
    assert "GuiLoMo (searched)" in page
    assert "LoRA (PEFT)" in page
    assert not list(finished.config.folder.rglob("checkpoints"))
    assert not list(finished.config.folder.rglob("*.unfinished"))


def test_two_runs_give_equal_numbers(colour_recipe: Any) -> None:
    found = [run_of(colour_recipe(name, methods=["guilomo", "lora"])).all() for name in ("one", "two")]
    assert without_times(found[0]) == without_times(found[1])


def test_a_smaller_batch_size_of_the_evaluation_changes_nothing_trained(colour_recipe: Any) -> None:
    results = [
        run_of(colour_recipe(str(size), methods=["lora"], evaluation={"batch_size": size})).all() for size in (3, 64)
    ]
    a, b = (r["methods"][0]["runs"][0] for r in results)
    assert a["loss_curve"] == b["loss_curve"]
    assert a["metrics"]["loss"]["value"] == pytest.approx(b["metrics"]["loss"]["value"], rel=1e-5)


def test_answers_are_chosen_and_generated(text_recipe: Any) -> None:
    content = text_recipe("causal_lm", methods=["guilomo", "uniform"], evaluation={"generate": True})
    job = run_of({**content, "train": {**content["train"], "start_from_search": True}})
    results = job.all()
    assert results["status"] == "complete"
    assert results["primary_metric"] == "accuracy"
    names = set(results["methods"][0]["summary"])
    assert {"loss", "perplexity", "accuracy", "accuracy_per_character", "f1", "exact_match"} <= names
    assert [t["metric"] for t in results["tests"]] == ["accuracy", "loss"]
    row = job.task.train[0]
    answer = [i for i in row["labels"] if i != -100]
    assert job.task.tokenizer.decode(answer).strip().startswith(job.task.examples["train"][0].answer)
    assert len(answer) < len(row["input_ids"])


@pytest.mark.slow
def test_starting_from_the_search_starts_lower(text_recipe: Any) -> None:
    """The carried experts have learned something, so the first training loss is below that of fresh ones."""
    first = {}
    for start in (False, True):
        content = text_recipe("causal_lm", str(start), methods=["guilomo"], search={"steps": 20, "learning_rate": 5e-3})
        content["train"] |= {"start_from_search": start, "max_steps": 2, "log_every": 1, "warmup_ratio": 0.5}
        first[start] = run_of(content).all()["methods"][0]["runs"][0]["loss_curve"][0][1]
    assert first[True] < first[False]


def test_starting_from_a_search_that_was_deleted_is_refused(text_recipe: Any) -> None:
    content = text_recipe("causal_lm", methods=["guilomo"], train={"start_from_search": True})
    job = run_of(content)
    job.search()
    (job.config.folder / "search" / "search.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint any more"):
        job.train(job.config.methods[0], 0)


def test_plain_text_is_scored_by_perplexity(text_recipe: Any) -> None:
    content = text_recipe("lm", methods=["guilomo", "lora", "random"], train={"start_from_search": True})
    results = run_of(content).all()
    assert results["primary_metric"] == "perplexity"
    assert {t["metric"] for t in results["tests"]} == {"loss"}
    assert results["data"]["chance"] is None
    assert results["data"]["labels"] is None
    for method in results["methods"]:
        assert method["summary"]["perplexity"]["mean"] > 1


@pytest.mark.parametrize("router", ["dense", "fixed"])
def test_routers_that_choose_every_expert_keep_the_budget(colour_recipe: Any, router: str) -> None:
    mixture = {"router": router, "balance_loss": None}
    results = run_of(colour_recipe(methods=["guilomo", "uniform"], mixture=mixture)).all()
    for method in results["methods"]:
        assert 0.99 * results["budget"]["parameters"] <= method["parameters"] <= results["budget"]["parameters"]
        assert method["active_parameters"] == method["parameters"]


def test_a_run_of_top_1_with_one_expert(colour_recipe: Any) -> None:
    """Top-k of the mixture is the search's too, and a single expert is allowed to be the most."""
    content = colour_recipe(mixture={"top_k": 1}, search={"max_experts": 1, "max_rank": 24}, budget={"experts": 1})
    results = run_of(content).all()
    assert config_of(content).search.top_k == 1
    assert results["status"] == "complete"


def test_balancing_by_layer_works_with_a_searched_plan(colour_recipe: Any) -> None:
    results = run_of(colour_recipe(methods=["guilomo", "random"], mixture={"balance_over": "layer"})).all()
    assert results["status"] == "complete"


@pytest.mark.parametrize("option", ["budget", "router", "weights"])
def test_what_is_common_to_all_methods_is_no_option_of_one(colour_recipe: Any, option: str) -> None:
    with pytest.raises(GuilomoError, match=f"'{option}', which is common to all methods"):
        run_of(colour_recipe(methods=[{"name": "uniform", "options": {option: 99_999}}]))


def test_the_random_control_draws_for_every_seed(finished: Run) -> None:
    folder = finished.config.folder / "methods"
    random = [Allocation.load(folder / "random" / f"seed-{seed}" / "allocation.json") for seed in (0, 3)]
    normal = [Allocation.load(folder / "normal" / f"seed-{seed}" / "allocation.json") for seed in (0, 3)]
    assert random[0].modules != random[1].modules
    assert normal[0] == normal[1]


def test_the_shuffled_control_has_the_searched_experts_in_other_places(finished: Run) -> None:
    searched = Allocation.load(finished.config.folder / "search" / "allocation.json")
    for seed in (0, 3):
        folder = finished.config.folder / "methods" / "shuffled" / f"seed-{seed}"
        assert Allocation.load(folder / "allocation.json") == shuffled(searched, seed)


def test_the_random_control_may_leave_out_what_the_search_may(colour_recipe: Any) -> None:
    """At a budget that cannot pay every module, the control chooses modules too."""
    space = {"min_experts": 0, "max_experts": 2, "max_rank": 4}
    budget = {"parameters": 2_000}
    job = run_of(colour_recipe(methods=["guilomo", "random"], mixture={"top_k": 1}, search=space, budget=budget))
    plans = [job.plan(job.config.methods[1], seed) for seed in range(6)]
    assert all(0 < len(plan.adapted()) < len(plan.modules) for plan in plans)
    assert len({frozenset(plan.adapted()) for plan in plans}) > 1
    assert job.all()["status"] == "complete"


def test_the_shuffled_control_takes_no_options(colour_recipe: Any) -> None:
    with pytest.raises(GuilomoError, match=r"\['seed'\], but the shuffled plan takes none"):
        run_of(colour_recipe(methods=[{"name": "shuffled", "options": {"seed": 3}}]))


def test_intervals_over_seeds_are_not_narrower_than_those_of_the_rows(results: dict[str, Any]) -> None:
    for method in results["methods"]:
        for name, summary in method["summary"].items():
            rows = [run["metrics"][name] for run in method["runs"]]
            narrowest = min(score["high"] - score["low"] for score in rows)
            # Where a scale ends, an interval may be cut.
            inside = summary["low"] > 0 and (summary["high"] < 1 or name == "loss")
            assert not inside or summary["high"] - summary["low"] >= 0.99 * narrowest
            assert summary["n"] == rows[0]["n"]
