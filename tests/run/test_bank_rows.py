"""Rows that start from ready-made adapters: chosen once, trained within the budget, and found again when saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bank_tools import replace_adapter, save_bank_of
from guilomo.adapters import Selection
from guilomo.cli.adapters import load_adapter
from guilomo.compare import CompareConfig, Comparison
from guilomo.errors import GuilomoError
from guilomo.layers.routers import ROUTERS
from guilomo.methods import METHODS
from guilomo.run import Run, RunConfig
from guilomo.run.methods import attach
from guilomo.run.trained import load_trained, save_trained, trained_parameters
from guilomo.tuner import LoraMoeLayer

BANKED = [name for name, method in METHODS.items() if method.starts_from == "adapters"]
ADAPTERS: dict[str, dict[str, Any]] = {"a": {"r": 1}, "b": {"r": 2}, "c": {"r": 1, "target_modules": ["o_proj"]}}


@pytest.fixture
def bank(llama_folder: Path, tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    return save_bank_of(base, tmp_path / "bank", ADAPTERS)


@pytest.fixture
def recipe(text_recipe: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return text_recipe("causal_lm")


def row(name: str, bank: Path, **options: object) -> dict[str, Any]:
    """With few rows and adapters to score."""
    few = {"k": 4, "count": 2, "pool": 3} if name in ("rocket", "loralib") else {}
    return {"name": name, "options": {"bank": str(bank), **few, **options}}


def run_of(recipe: dict[str, Any], *rows: object, **changes: object) -> Run:
    return Run(RunConfig.model_validate({**recipe, "methods": list(rows), **changes}))


@pytest.mark.parametrize("name", BANKED)
def test_a_row_is_trained_within_the_budget_and_scored(name: str, bank: Path, recipe: dict[str, Any]) -> None:
    run = run_of(recipe, "lora", row(name, bank))
    run.prepare(resume=False)
    (plain, own) = run.all()["methods"]
    assert own["summary"]["loss"]["seeds"] == 1
    assert 0 < own["parameters"] <= run.facts["budget"]
    assert own["parameters"] == own["runs"][0]["trained_parameters"]
    assert plain["parameters"] == plain["runs"][0]["trained_parameters"]
    assert own["parameters"] <= own["active_parameters"]
    chosen = Selection.load(run.config.folder / "methods" / name / "selection.json").chosen
    assert len(chosen) == (2 if name in ("rocket", "loralib") else 3)


@pytest.mark.parametrize("name", BANKED)
def test_what_is_trained(name: str, bank: Path, recipe: dict[str, Any]) -> None:
    run = run_of(recipe, row(name, bank))
    (method,) = run.config.methods
    plan = run.plan(method, 0)
    model = attach(run.fresh_model(0), plan, method, run.config, run.task)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    if name == "xlora":
        assert all("internal_xlora_classifier" in n for n in names)
    else:
        assert any("router" in n for n in names)
        assert any(".molora_A" in n for n in names) == (name == "rocket")
        layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer)]
        assert {type(m.molora_router["default"]) for m in layers} == {ROUTERS[METHODS[name].mixture["router"]]}


@pytest.mark.parametrize("name", BANKED)
def test_a_saved_row_comes_back_to_the_same_bits(name: str, bank: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(recipe, row(name, bank))
    (method,) = run.config.methods
    model, record = run.fit(method, 0, 1e-2, tmp_path / "fitted", "fit")
    assert record["trained_parameters"] == trained_parameters(model)
    plan = run.plan(method, 0)
    again = attach(run.fresh_model(1), plan, method, run.config, run.task)
    load_trained(again, tmp_path / "fitted" / "adapter")
    batch = run.task.collate(run.task.test[:3])
    with torch.no_grad():
        first, second = model.eval()(**batch).logits, again.eval()(**batch).logits
        opened = load_adapter(run.fresh_model(1), tmp_path / "fitted" / "adapter").eval()(**batch).logits
    assert torch.equal(first, second)
    assert torch.equal(first, opened)
    save_trained(again, tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "fitted" / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_the_choice_is_made_once_and_bound_to_the_data(bank: Path, recipe: dict[str, Any]) -> None:
    run = run_of(recipe, row("loralib", bank))
    (method,) = run.config.methods
    run.plan(method, 0)
    path = run.config.folder / "methods" / "loralib" / "selection.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "chosen": ["c"]}))
    assert run.plan(method, 0).adapted()["model.layers.0.self_attn.o_proj"].experts == 1
    path.write_text(json.dumps({**found, "data_hash": "other"}))
    with pytest.raises(GuilomoError, match="have changed since"):
        run.plan(method, 0)


def test_the_choice_holds_where_the_bank_has_moved(bank: Path, recipe: dict[str, Any]) -> None:
    """As for another machine of a comparison, which sees it under another path."""
    run = run_of(recipe, row("loralib", bank))
    plan = run.plan(run.config.methods[0], 0)
    elsewhere = run_of(recipe, row("loralib", bank.rename(bank.with_name("moved"))))
    (method,) = elsewhere.config.methods
    assert elsewhere.plan(method, 0) == plan
    attach(elsewhere.fresh_model(0), plan, method, elsewhere.config, elsewhere.task)


def test_an_adapter_that_was_replaced_is_refused(bank: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Also in the middle of a row's trainings; what is done stays, and a restored one is trained on."""
    run = run_of(recipe, row("loralib", bank, by="manual", names=["b", "a"]), seeds=[0, 1, 2])
    (method,) = run.config.methods
    done, plan = run.train(method, 0), run.plan(method, 0)
    kept = shutil.copytree(bank / "a", tmp_path / "kept")
    replace_adapter(bank / "a")
    folder = run.config.folder / "methods" / "loralib"
    said = rf"Adapter 'a' in {bank / 'a'} is not the one that was chosen.*Restore it, or delete {folder} to choose"
    assert run.train(method, 0)["rows"] == done["rows"]
    with pytest.raises(GuilomoError, match=said):
        run.train(method, 1)
    with pytest.raises(GuilomoError, match=said):
        attach(run.fresh_model(0), plan, method, run.config, run.task)
    shutil.rmtree(bank / "a")
    with pytest.raises(GuilomoError, match=said):
        run.train(method, 1)
    shutil.copytree(kept, bank / "a")
    assert run.train(method, 1)["seed"] == 1
    config = json.loads((bank / "a" / "adapter_config.json").read_text())
    (bank / "a" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 80}))
    with pytest.raises(GuilomoError, match=said):
        run.train(method, 2)
    shutil.rmtree(folder)
    assert run.train(method, 2)["seed"] == 2


def test_an_adapter_that_was_not_chosen_may_change(bank: Path, recipe: dict[str, Any]) -> None:
    run = run_of(recipe, row("loralib", bank, count=2))
    (method,) = run.config.methods
    plan = run.plan(method, 0)
    selection = Selection.load(run.config.folder / "methods" / "loralib" / "selection.json")
    assert len({candidate.digest for candidate in selection.candidates}) == 3
    for name in {"a", "b", "c"} - {*selection.chosen}:
        replace_adapter(bank / name)
    assert run.plan(method, 0) == plan
    attach(run.fresh_model(0), plan, method, run.config, run.task)


def test_xlora_refuses_what_it_would_load_in_part(bert_folder: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder)
    bank = save_bank_of(base, tmp_path / "encoders", {"a": {"target_modules": ["query"], "task_type": "SEQ_CLS"}})
    with pytest.raises(GuilomoError, match=r"adapter 'a': module = 'bert\..*where PEFT's X-LoRA looks"):
        run_of(recipe, row("xlora", bank))


def test_a_comparison_has_such_rows(bank: Path, recipe: dict[str, Any], tmp_path: Path) -> None:
    """With a sweep, so that a row is also taken over from the training at its rate."""
    task = {**recipe["task"], "name": "colours"}
    config = CompareConfig.model_validate(
        {
            "output": str(tmp_path / "compared"),
            "model": recipe["model"],
            "tasks": [task],
            "budget": recipe["budget"],
            "train": {**recipe["train"], "max_steps": 2},
            "sweep": {"learning_rates": [1e-3, 1e-2]},
            "methods": ["lora", row("xlora", bank), row("meteora", bank)],
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
        assert entry["parameters"] > 0
        assert entry["rank"] is not None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("xlora", {"bank": None}, r"options: bank = None is not usable"),
        ("xlora", {"bank": "nowhere"}, r"bank = '.*nowhere'.*a folder whose subfolders hold"),
        ("meteora", {"by": "rockte"}, r"by = 'rockte' is not usable.*Did you mean 'rocket'"),
        ("meteora", {"bnak": 1}, r"bnak is not a known key.*Did you mean 'bank'"),
        ("meteora", {"by": "manual"}, r"names = None contradicts by = 'manual'"),
        ("meteora", {"classifier": {"depth": 2}}, r"no classifier: that is X-LoRA's"),
        ("xlora", {"train": "all"}, r"the classifier alone is trained"),
    ],
)
def test_options_that_cannot_be(
    name: str, options: dict[str, Any], said: str, bank: Path, recipe: dict[str, Any]
) -> None:
    with pytest.raises(GuilomoError, match=said):
        run_of(recipe, {"name": name, "options": {"bank": str(bank), **options}})


def test_a_row_without_a_bank_says_how_to_give_one(recipe: dict[str, Any]) -> None:
    with pytest.raises(GuilomoError, match=r"\{name: meteora, options: \{bank: FOLDER\}\}"):
        run_of(recipe, "meteora")


def test_adapters_that_are_trained_must_fit_the_budget(bank: Path, recipe: dict[str, Any]) -> None:
    run = run_of(recipe, row("rocket", bank), budget={"parameters": 900})
    (method,) = run.config.methods
    with pytest.raises(GuilomoError, match=r"would train [\d,]+ parameters, but the budget is 900"):
        run.fit(method, 0, 1e-3, run.config.folder / "fitted", "fit")
