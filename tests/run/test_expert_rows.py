"""Rows that start from full models: extracted once, trained within the budget, and found again without them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from expert_tools import experts_of, save_experts
from guilomo.allocation import Allocation
from guilomo.cli import main
from guilomo.cli.adapters import load_adapter
from guilomo.compare import CompareConfig, Comparison
from guilomo.errors import GuilomoError
from guilomo.layers.routers import ROUTERS
from guilomo.run import Run, RunConfig
from guilomo.run.files import read_json
from guilomo.run.methods import attach
from guilomo.run.trained import load_trained, trained_parameters
from guilomo.sparse_moe import Extraction, extraction_of_models, models_in
from guilomo.training import Interrupted
from guilomo.tuner import LoraMoeLayer
from tiny_runs import StopAfter, without_times, write_recipe

RANKS = {"law": 3, "maths": "effective", "code": 0}


@pytest.fixture
def experts(llama_folder: Path, tmp_path: Path) -> Path:
    return save_experts(experts_of(AutoModelForCausalLM.from_pretrained(llama_folder)), tmp_path / "experts")


@pytest.fixture
def recipe(text_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return text_recipe("lm")


def row(experts: Path, **options: object) -> dict[str, Any]:
    return {"name": "flexmore", "options": {"experts": str(experts), "ranks": RANKS, **options}}


def run_of(recipe: dict[str, Any], *rows: object, **changes: object) -> Run:
    return Run(RunConfig.model_validate({**recipe, "methods": list(rows), **changes}))


@pytest.mark.usefixtures("real_page")
def test_a_row_is_trained_reported_and_scored_again(
    experts: Path, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan in the results is that of the experts, and the saved adapter has the same scores without them."""
    run = run_of(recipe, "lora", row(experts))
    run.prepare(resume=False)
    (_, own) = run.all()["methods"]
    made = extraction_of_models(run.fresh_model(0), models_in(experts), RANKS)
    folder = run.config.folder / "methods" / "flexmore" / "seed-0"
    assert Allocation.from_dict(own["allocation"]) == made.plan
    assert Allocation.load(folder / "allocation.json") == made.plan
    routers = 2 * 4 * 32
    assert own["parameters"] == own["runs"][0]["trained_parameters"] == routers
    assert own["active_parameters"] > routers
    page = (run.config.folder / "report.html").read_text(encoding="utf-8")
    assert "FlexMoRE" in page
    file = write_recipe(tmp_path / "recipe.yaml", {**recipe, "methods": ["lora"]})
    shutil.rmtree(experts)
    assert main(["evaluate", str(file), "--adapter", str(folder / "adapter"), "--json", str(tmp_path / "scores")]) == 0
    assert read_json(tmp_path / "scores")["metrics"] == own["runs"][0]["metrics"]
    assert main(["inspect", str(folder / "adapter")]) == 0
    assert "0 base, 1 code, 2 law, 3 maths" in capsys.readouterr().out


def test_a_stopped_run_continues_to_the_same_bits(experts: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    whole = run_of(recipe, row(experts, train="all"), output=str(tmp_path / "whole"), budget={"parameters": 10**6})
    whole.prepare(resume=False)
    wanted = whole.all()
    stop = StopAfter("flexmore seed 0", 2)
    settings = {**recipe, "methods": [row(experts, train="all")], "budget": {"parameters": 10**6}}
    stopped = Run(RunConfig.model_validate(settings), progress=stop.progress, should_stop=stop.should_stop)
    stopped.prepare(resume=False)
    with pytest.raises(Interrupted):
        stopped.all()
    made = (stopped.config.folder / "methods" / "flexmore" / "experts.safetensors").read_bytes()
    again = Run(RunConfig.model_validate(settings))
    again.prepare(resume=True)
    found = again.all()
    places = [run.config.folder / "methods" / "flexmore" for run in (again, whole)]
    assert (places[0] / "experts.safetensors").read_bytes() == made
    adapters = [(place / "seed-0" / "adapter" / "adapter_model.safetensors").read_bytes() for place in places]
    assert adapters[0] == adapters[1]
    assert without_times(found["methods"]) == without_times(wanted["methods"])


@pytest.mark.parametrize("train", ["router", "all"])
def test_what_is_trained(train: str, experts: Path, recipe: dict[str, Any]) -> None:
    mixture = {"router": "topk_of_softmax", "top_k": 3, "balance_loss": "switch"}
    run = run_of(recipe, {**row(experts, train=train), "mixture": mixture}, budget={"parameters": 10**6})
    (method,) = run.config.methods
    plan = run.plan(method, 0)
    model = attach(run.fresh_model(0), plan, method, run.config, run.task)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("router" in n for n in names)
    assert any("molora_A" in n or "molora_B" in n for n in names) == (train == "all")
    assert {m.top_k for m in plan.modules.values()} == {3}
    layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer)]
    assert {type(r) for layer in layers for r in layer.molora_router.values()} == {ROUTERS["topk_of_softmax"]}
    assert model.peft_config["default"].balance_loss == "switch"
    assert model.peft_config["default"].train == train


def test_a_saved_row_comes_back_to_the_same_bits(experts: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(recipe, row(experts))
    (method,) = run.config.methods
    model, record = run.fit(method, 0, 1e-2, tmp_path / "fitted", "fit")
    assert record["trained_parameters"] == trained_parameters(model)
    plan = run.plan(method, 0)
    again = attach(run.fresh_model(1), plan, method, run.config, run.task)
    load_trained(again, tmp_path / "fitted" / "adapter")
    shutil.rmtree(experts)
    opened = [
        load_adapter(run.fresh_model(1), tmp_path / "fitted" / "adapter"),
        PeftModel.from_pretrained(run.fresh_model(1), str(tmp_path / "fitted" / "adapter")),
    ]
    batch = run.task.collate(run.task.test[:3])
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
        for found in (again, *opened):
            assert torch.equal(found.eval()(**batch).logits, wanted)


def test_experts_are_extracted_once(experts: Path, recipe: dict[str, Any]) -> None:
    """What the models become afterwards changes nothing, and every seed starts from the same experts."""
    run = run_of(recipe, row(experts))
    (method,) = run.config.methods
    plan = run.plan(method, 0)
    file = run.config.folder / "methods" / "flexmore" / "experts.safetensors"
    made = Extraction.load(file)
    for name in ("maths", "law"):
        shutil.copy(experts / "code" / "model.safetensors", experts / name / "model.safetensors")
    assert run.plan(method, 1) == plan == made.plan
    models = [attach(run.fresh_model(seed), plan, method, run.config, run.task) for seed in (0, 1)]
    first, second = ({n: p for n, p in model.named_parameters() if "molora" in n} for model in models)
    for name, weight in first.items():
        assert torch.equal(weight, second[name]) == ("router" not in name), name
    for name, pair in made.factors.items():
        assert torch.equal(first[f"base_model.model.{name}.molora_A.default"], pair.a)


def test_a_classifier_has_its_own_head(
    bert_folder: Path, colour_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=5, ignore_mismatched_sizes=True)
    experts = save_experts(experts_of(base), tmp_path / "experts")
    run = run_of(colour_recipe(), row(experts))
    run.prepare(resume=False)
    (own,) = run.all()["methods"]
    assert own["summary"]["accuracy"]["seeds"] == 1
    assert own["parameters"] == 2 * 4 * 32
    adapter = run.config.folder / "methods" / "flexmore" / "seed-0" / "adapter"
    model = load_adapter(run.fresh_model(0), adapter)
    assert "classifier" in model.peft_config["default"].modules_to_save


def test_a_comparison_has_such_rows(experts: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """With a sweep, so that a row is also taken over from the training at its rate."""
    rows = [{**row(experts, ranks=rank), "name": f"rank-{rank}", "strategy": "flexmore"} for rank in (1, 4)]
    config = CompareConfig.model_validate(
        {
            "output": str(tmp_path / "compared"),
            "model": recipe["model"],
            "tasks": [{**recipe["task"], "name": "colours"}],
            "budget": recipe["budget"],
            "train": {**recipe["train"], "max_steps": 2},
            "sweep": {"learning_rates": [1e-3, 1e-2]},
            "methods": ["lora", *rows],
            "seeds": [0, 1],
        }
    )
    job = Comparison(config)
    job.prepare(resume=False)
    results = job.run()
    assert results["failures"] == []
    assert results["status"] == "complete"
    for method in results["methods"]:
        entry = method["tasks"]["colours"]
        assert entry["step_time_ratio"]["median"] > 0, method["name"]
        assert 0 < entry["parameters"] <= results["tasks"][0]["budget"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": "nowhere"}, r"experts = '.*nowhere'.*an existing folder of model folders"),
        ({"experts": {"law": "nowhere"}}, r"folder of expert 'law' = '.*nowhere'.*safetensors files"),
        ({"experts": 3}, r"Method 'flexmore', options: experts = 3 is not usable"),
        ({"exprets": 1}, r"exprets is not a known key.*Did you mean 'experts'"),
        ({"ranks": "best"}, r"rank = 'best'.*or 'effective'"),
        ({"ranks": {"law": 1}}, r"ranks = \{'law': 1\}.*one for each of code, law, maths"),
        ({"train": "experts"}, r"train = 'experts' is not usable"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str, experts: Path, recipe: dict[str, Any]) -> None:
    with pytest.raises(GuilomoError, match=said):
        run_of(recipe, {"name": "flexmore", "options": {"experts": str(experts), **options}})


def test_a_row_without_experts_says_how_to_give_them(recipe: dict[str, Any]) -> None:
    with pytest.raises(GuilomoError, match=r"ready-made models, and options\.experts.*options: \{experts: FOLDER\}\}"):
        run_of(recipe, "flexmore")
    with pytest.raises(GuilomoError, match=r"\{name: low, strategy: flexmore, options: \{experts: FOLDER\}\}"):
        run_of(recipe, {"name": "low", "strategy": "flexmore"})


def test_experts_that_are_trained_must_fit_the_budget(experts: Path, recipe: dict[str, Any]) -> None:
    run = run_of(recipe, row(experts, ranks=8, train="all"), budget={"parameters": 900})
    (method,) = run.config.methods
    with pytest.raises(GuilomoError, match=r"would train [\d,]+ parameters, but the budget is 900.*train: router"):
        run.fit(method, 0, 1e-3, run.config.folder / "fitted", "fit")


def test_it_runs_as_its_recipe_is_printed(
    experts: Path, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", "flexmore", "--recipe"]) == 0
    file = tmp_path / "flexmore.yaml"
    file.write_text(capsys.readouterr().out.replace("experts: FOLDER", f"experts: {experts}"), encoding="utf-8")
    changes = [f"{key}={json.dumps(recipe[key])}" for key in ("model", "task", "budget", "train", "output")]
    assert main(["run", str(file), "--quiet", *(part for change in changes for part in ("--set", change))]) == 0
    results = read_json(tmp_path / "run" / "results.json")
    assert [method["name"] for method in results["methods"]] == ["lora", "flexmore"]


@pytest.mark.parametrize("key", ["alpha", "target_modules", "feed_forward_experts"])
def test_keys_that_the_models_decide_are_refused(key: str, experts: Path, recipe: dict[str, Any]) -> None:
    value = {"alpha": 64, "target_modules": ["q_proj"], "feed_forward_experts": False}[key]
    with pytest.raises(GuilomoError, match=rf"mixture\.{key} of method 'flexmore' = .*unset.*models decide it"):
        run_of(recipe, {**row(experts), "mixture": {key: value}})


def test_more_seeds_need_the_models_no_more(experts: Path, recipe: dict[str, Any]) -> None:
    run = run_of(recipe, row(experts))
    run.prepare(resume=False)
    run.all()
    shutil.rmtree(experts)
    more = run_of(recipe, row(experts), seeds=[0, 1])
    more.prepare(resume=True)
    assert [found["seed"] for found in more.all()["methods"][0]["runs"]] == [0, 1]
