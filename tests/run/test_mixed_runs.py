"""Several tasks trained as one: which methods know the task of a row, and that it reaches them everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer, TrainerControl, TrainerState

from bank_tools import save_bank_of
from guilomo.cli import main
from guilomo.errors import GuilomoError
from guilomo.evaluation import evaluate
from guilomo.evaluation.generation import generate_answers
from guilomo.layers.routers import LoraMixerRouter
from guilomo.methods import METHODS
from guilomo.run import Run
from guilomo.run.files import read_json
from guilomo.run.methods import attach
from guilomo.tasks import build_task
from guilomo.training import Interrupted, RouterStageCallback, TrainConfig, fine_tune, training_arguments
from guilomo.tuner import (
    LoraMoeLayer,
    add_preservation,
    expert_weights,
    follow_training,
    preservation_loss,
    tasks_given,
)
from tiny_runs import colour_rows, config_of, run_of, write_recipe, write_rows

TASK_METHODS = ["moelora", "hmora", "lora_mixer", "loramoe"]


@pytest.fixture
def mixed(colours: Path, tmp_path: Path) -> dict[str, Any]:
    """The keys of a task of two parts: colours, and the same with the classes swapped, so that the task matters."""
    rows = colour_rows(48, "train")
    swapped = [{**row, "label": 1 - row["label"], "answer": row["choices"][1 - row["label"]]} for row in rows]
    path = write_rows(tmp_path / "swapped.jsonl", swapped)
    return {"name": None, "parts": [{"name": "colours"}, {"name": "swapped", "source": str(path)}]}


@pytest.fixture
def job(colour_recipe: Any, mixed: dict[str, Any]) -> Run:
    return run_of(colour_recipe(task=mixed, methods=["lora", *TASK_METHODS]))


def model_of(job: Run, name: str, **mixture: Any) -> PeftModel:
    method = next(m for m in job.config.methods if m.name == name)
    method = method.model_copy(update={"mixture": mixture})
    return attach(job.fresh_model(0), job.plan(method, 0), method, job.config, job.task)


def test_methods_know_how_many_tasks_there_are(job: Run) -> None:
    options = {m.name: job.config.mixture_of(m) for m in job.config.methods}
    assert options["moelora"].router_options == {"tasks": 2}
    assert options["hmora"].router_options["tasks"] == 2
    assert options["lora_mixer"].router_options == {"hard_share": 0.9}
    assert (options["loramoe"].balance_loss, options["loramoe"].balance_options) == ("localized", {"types": 2})
    assert {m.experts for m in job.plan(job.config.methods[3], 0).adapted().values()} == {2}  # one for each task
    single = config_of({**job.config.model_dump(mode="json"), "task": {"source": "docstrings"}})
    options = {m.name: single.mixture_of(m) for m in single.methods}
    assert options["moelora"].router_options == {"tasks": 1}
    assert options["lora_mixer"].router_options == {}
    assert options["loramoe"].balance_loss == "cv_squared"


def test_the_whole_job(job: Run) -> None:
    """Trained, saved, scored; a saved adapter gives the same scores again."""
    job.prepare(resume=False)
    results = job.all()
    assert results["status"] == "complete"
    assert results["data"]["name"] == "colours+swapped"
    for name in ("lora", *TASK_METHODS):
        folder = job.config.folder / "methods" / name / "seed-0"
        again = PeftModel.from_pretrained(job.fresh_model(0), folder / "adapter")
        found = evaluate(again, job.task, batch_size=job.config.evaluation.batch_size)
        assert found.row_loss == read_json(folder / "result.json")["rows"]["row_loss"]


@pytest.mark.parametrize("name", ["lora", *TASK_METHODS])
def test_ids_reach_the_routers_that_read_them(job: Run, name: str) -> None:
    """Other ids, other losses; but plain LoRA, soft LoRA-Mixer and dense routing read none."""
    model = model_of(job, name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    before = evaluate(model, job.task).row_loss
    for row in job.task.test:
        row["router_task_ids"] = 1 - row["router_task_ids"]
    assert (evaluate(model, job.task).row_loss != before) == (name in ("moelora", "hmora"))


def test_answers_and_options_are_scored_with_their_task(text_recipe: Any, mixed: dict[str, Any]) -> None:
    job = run_of(text_recipe("causal_lm", task=mixed, methods=["moelora"]))
    model = model_of(job, "moelora")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraMoeLayer):
                torch.nn.init.normal_(module.molora_B["default"], generator=torch.Generator().manual_seed(1))
    whole = evaluate(model, job.task, generate=True, max_new_tokens=4)
    assert whole.generated is not None
    seen: list[str] = []
    for place, config in enumerate(job.task.config.part_configs()):
        part = build_task(config, job.task.tokenizer)
        with tasks_given(model, torch.tensor([place])):
            own = evaluate(model, part, batch_size=1)
            with torch.no_grad():
                texts = generate_answers(model.eval(), part, part.examples["test"], 1, 4)
        rows = slice(len(seen), len(seen) + len(own.ids))
        assert whole.row_loss[rows] == pytest.approx(own.row_loss, rel=1e-5)
        assert whole.predictions is not None
        assert whole.predictions[rows] == own.predictions
        assert whole.generated[rows] == texts
        seen += own.ids
    assert len(seen) == len(whole.ids)
    assert len(set(whole.generated)) > 1


CONFIG = TrainConfig(max_steps=7, batch_size=8, log_every=3, save_every=1, learning_rate=1e-2)


def stages(model: PeftModel) -> set[str]:
    return {m.stage for m in model.modules() if isinstance(m, LoraMixerRouter)}


@pytest.mark.parametrize(("share", "hard"), [(0.5, 4), (1.0, 7)])
def test_first_hard_then_soft(job: Run, tmp_path: Path, share: float, hard: int) -> None:
    model = model_of(job, "lora_mixer", router_options={"hard_share": share})
    seen: list[set[str]] = []
    fine_tune(model, job.task, CONFIG, tmp_path, progress=lambda *_: seen.append(stages(model)))
    assert seen == [{"hard"}] * hard + [{"soft"}] * (7 - hard)
    assert stages(model) == {"soft"}


def test_in_the_hard_stage_an_expert_learns_from_its_own_task_alone(job: Run, tmp_path: Path) -> None:
    model = model_of(job, "lora_mixer", router_options={"hard_share": 1.0})
    layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer)]
    before = [(m.molora_A["default"].clone(), m.molora_B["default"].clone()) for m in layers]
    routers = [m.weight.clone() for m in model.modules() if isinstance(m, LoraMixerRouter)]
    job.task.train = [row for row in job.task.train if row["router_task_ids"] == 0]
    fine_tune(model, job.task, CONFIG.model_copy(update={"use_held_out": False}), tmp_path)
    for layer, (a, b) in zip(layers, before, strict=True):
        first = layer.molora_plan["default"].ranks[0]
        assert torch.equal(layer.molora_A["default"][first:], a[first:])
        assert torch.equal(layer.molora_B["default"][:, first:], b[:, first:])
        assert not torch.equal(layer.molora_B["default"][:, :first], b[:, :first])
    after = [m.weight for m in model.modules() if isinstance(m, LoraMixerRouter)]
    assert all(map(torch.equal, routers, after))


@pytest.mark.parametrize("preserve", [0.0, 0.5])
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_training_of_two_stages_continues_to_the_same_bits(
    job: Run, tmp_path: Path, stop: int, preserve: float
) -> None:
    options = {"hard_share": 0.5, "preserve": preserve}

    def trained(folder: str, stop: int | None) -> dict[str, torch.Tensor]:
        model = model_of(job, "lora_mixer", router_options=options)
        if stop is not None:
            asked = iter(range(1, stop + 1))
            with pytest.raises(Interrupted):
                fine_tune(model, job.task, CONFIG, tmp_path / folder, should_stop=lambda: next(asked) == stop)
            model = model_of(job, "lora_mixer", router_options=options)
        fine_tune(model, job.task, CONFIG, tmp_path / folder)
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    whole, parts = trained("whole", None), trained("parts", stop)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_soft_stage_keeps_experts_where_the_hard_one_left_them(job: Run, tmp_path: Path) -> None:
    def moved(preserve: float) -> float:
        """How far the experts are, at the end, from where they were when the soft stage began."""
        model = model_of(job, "lora_mixer", router_options={"hard_share": 0.5, "preserve": preserve})
        seen: list[dict[str, torch.Tensor]] = []
        fine_tune(
            model, job.task, CONFIG, tmp_path / str(preserve), progress=lambda *_: seen.append(expert_weights(model))
        )
        return preservation_loss(model, seen[3]).item()

    assert moved(100.0) < 0.5 * moved(0.0)


def test_its_gradient_is_that_of_the_loss(job: Run) -> None:
    model = model_of(job, "lora_mixer").double()
    experts = {n: p for n, p in model.named_parameters() if ".molora_A." in n or ".molora_B." in n}
    start = {name: weight + torch.randn_like(weight) for name, weight in expert_weights(model).items()}
    (0.3 * preservation_loss(model, start)).backward()
    wanted = {name: p.grad for name, p in experts.items()}
    for place, parameter in enumerate(experts.values()):
        parameter.grad = torch.zeros_like(parameter) if place else None  # what is not trained stays so
    add_preservation(model, start, 0.3)
    first, *rest = experts
    assert experts[first].grad is None
    assert all(torch.allclose(experts[name].grad, wanted[name], rtol=1e-12) for name in rest)


def test_a_trainer_of_ones_own_continues_with_the_same_start(job: Run, tmp_path: Path) -> None:
    model = model_of(job, "lora_mixer", router_options={"hard_share": 0.5, "preserve": 1.0})
    arguments = training_arguments(CONFIG, tmp_path, 0, use_cpu=True)
    first = RouterStageCallback()
    Trainer(model, arguments, job.task.collate, job.task.train, callbacks=[first]).train()
    assert first.start
    state = TrainerState(global_step=6, max_steps=7)
    again = RouterStageCallback()
    again.on_train_begin(arguments, state, TrainerControl(), model=model)
    assert again.start.keys() == first.start.keys()
    assert all(torch.equal(again.start[name], first.start[name]) for name in first.start)


def test_a_loop_of_ones_own(job: Run) -> None:
    model = model_of(job, "lora_mixer", router_options={"hard_share": 0.5})
    for progress, stage in ((0.0, "hard"), (0.49, "hard"), (0.5, "soft"), (1.0, "soft")):
        follow_training(model, progress)
        assert stages(model) == {stage}
    without = model_of(job, "lora_mixer", router_options={})
    follow_training(without, 0.0)
    assert stages(without) == {"soft"}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "moelora", "mixture": {"router_options": {"tasks": 1}}}, r"router_options\.tasks.*= 1.*at least 2"),
        ({"name": "lora_mixer", "options": {"experts": 1}}, r"experts of method 'lora_mixer' in .* = 1.*for each part"),
        ({"name": "lora_mixer", "options": {"experts": "two"}}, r"options\.experts of method 'lora_mixer' = 'two'"),
        ({"name": "lora_mixer", "mixture": {"router_options": {"hard_share": 2}}}, r"hard_share'\] = 2"),
        ({"name": "moelora", "mixture": {"router_options": {}}}, r"tasks'\] = None.*the number of tasks"),
        ({"name": "moelora", "mixture": {"router_options": {"tasks": "two"}}}, r"tasks'\] = 'two'"),
    ],
)
def test_too_few_places_are_refused(
    method: dict[str, Any], said: str, colour_recipe: Any, mixed: dict[str, Any]
) -> None:
    def planned() -> None:
        job = run_of(colour_recipe(task=mixed, methods=[method]))
        job.plan(job.config.methods[0], 0)

    with pytest.raises(GuilomoError, match=said):
        planned()


def test_a_localised_balance_needs_a_type_for_each_part(colour_recipe: Any, mixed: dict[str, Any]) -> None:
    three = {**mixed, "parts": [*mixed["parts"], {**mixed["parts"][1], "name": "third"}]}
    row = {"name": "loramoe", "mixture": {"balance_options": {"types": 2}}}
    with pytest.raises(GuilomoError, match=r"balance_options\.types of method 'loramoe' = 2.*at least 3"):
        run_of(colour_recipe(task=three, methods=[row]))
    job = run_of(colour_recipe(task=three, methods=[{"name": "loramoe", "options": {"experts": 2}}]))
    with pytest.raises(GuilomoError, match=r"experts of method 'loramoe' in .* = 2.*at least 3"):
        job.plan(job.config.methods[0], 0)


def test_wrapped_models_are_scored_with_the_tasks_of_their_rows(job: Run) -> None:
    model = model_of(job, "moelora")
    plain = evaluate(model, job.task).row_loss
    wrapped = torch.compile(model, backend="eager")
    assert evaluate(wrapped, job.task).row_loss == pytest.approx(plain, rel=1e-5)
    base = job.fresh_model(0)
    evaluate(base, job.task)
    assert not any("_guilomo_context" in vars(module) for module in base.modules())


def test_a_hard_stage_needs_tasks(colour_recipe: Any, tmp_path: Path) -> None:
    mixture = {"router_options": {"hard_share": 0.5}}
    job = run_of(colour_recipe(methods=[{"name": "lora_mixer", "mixture": mixture}]))
    with pytest.raises(GuilomoError, match=r"none was given\. In a recipe, give the tasks as task\.parts"):
        fine_tune(model_of(job, "lora_mixer", **mixture), job.task, CONFIG, tmp_path)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.starts_from == "adapters"])
def test_rows_from_a_bank_take_mixed_tasks(
    name: str, llama_folder: Path, text_recipe: Any, mixed: dict[str, Any], tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    bank = save_bank_of(base, tmp_path / "bank", {"a": {"r": 1}, "b": {"r": 2}})
    few = {"k": 4, "count": 2, "pool": 3} if name in ("rocket", "loralib") else {}
    row = {"name": name, "options": {"bank": str(bank), **few}}
    job = run_of(text_recipe("causal_lm", task=mixed, methods=["lora", row]))
    job.prepare(resume=False)
    own = job.all()["methods"][1]
    assert set(own["parts"]) == {"colours", "swapped"}
    whole, parts = own["summary"]["loss"], own["parts"]
    assert whole["n"] == sum(part["loss"]["n"] for part in parts.values())


def test_meteora_is_told_its_tasks_in_the_order_of_its_adapters(
    llama_folder: Path, text_recipe: Any, mixed: dict[str, Any], tmp_path: Path
) -> None:
    """Expert e is adapter e, so part e must be its task; the loss then teaches the router."""
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    bank = save_bank_of(base, tmp_path / "bank", {"colours": {"r": 1}, "swapped": {"r": 2}, "z": {"r": 1}})

    def fitted(coefficient: float, task: dict[str, Any]) -> dict[str, Any]:
        mixture = {"router_loss_coefficient": coefficient, "top_k": 1}
        row = {"name": "meteora", "options": {"bank": str(bank)}, "mixture": mixture}
        output = f"run {coefficient} {len(task)} {task is mixed}"
        job = run_of(text_recipe("causal_lm", output, task=task, methods=[row]))
        (method,) = job.config.methods
        model, _ = job.fit(method, 0, 1e-1, tmp_path / output / "fitted", "fit")
        return model.state_dict()

    # With one expert per token nothing but this loss teaches the router.
    before, after = fitted(0.0, mixed), fitted(50.0, mixed)
    routers = [name for name in after if "router" in name]
    assert routers
    assert not any(torch.equal(before[name], after[name]) for name in routers)
    turned = {**mixed, "parts": mixed["parts"][::-1]}
    for task in (turned, {}):
        mixture = {"router_loss_coefficient": 1.0}
        rows = ["lora", {"name": "meteora", "options": {"bank": str(bank)}, "mixture": mixture}]
        with pytest.raises(GuilomoError, match=r"the parts are (swapped, colours|none) and the adapters colours, swap"):
            run_of(text_recipe("causal_lm", task=task, methods=rows))  # before any row is trained


def test_scores_of_the_parts_are_those_of_their_rows(job: Run) -> None:
    model = model_of(job, "moelora")
    found = evaluate(model, job.task)
    assert list(found.parts) == ["colours", "swapped"]
    places = [row["router_task_ids"] for row in job.task.test]
    for place, scores in enumerate(found.parts.values()):
        hits = [hit for hit, own in zip(found.hits["accuracy"], places, strict=True) if own == place]
        losses = [loss for loss, own in zip(found.row_loss, places, strict=True) if own == place]
        assert scores["accuracy"].value == sum(hits) / len(hits)
        assert scores["loss"].value == pytest.approx(sum(losses) / len(losses))
    job.task.test = [row for row in job.task.test if row["router_task_ids"] == 1]
    assert list(evaluate(model, job.task).parts) == ["swapped"]  # as where few rows were drawn


def test_an_adapter_knows_its_tasks_by_their_order(
    colour_recipe: Any, mixed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = colour_recipe(task=mixed, methods=["moelora"])
    job = run_of(recipe)
    job.prepare(resume=False)
    job.all()
    adapter = str(job.config.folder / "methods" / "moelora" / "seed-0" / "adapter")
    assert main(["inspect", adapter]) == 0
    assert "tasks    0 colours, 1 swapped" in capsys.readouterr().out
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert main(["evaluate", str(file), "--adapter", adapter]) == 0
    turned = {**recipe, "task": {**recipe["task"], "parts": recipe["task"]["parts"][::-1]}}
    file = write_recipe(tmp_path / "turned.yaml", turned)
    assert main(["evaluate", str(file), "--adapter", adapter]) != 0
    assert "['colours', 'swapped'], or the first of them" in " ".join(capsys.readouterr().err.split())


def test_a_part_with_options_is_scored_by_them_beside_one_without(
    text_recipe: Any, mixed: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"id": f"f-{i}", "type": "gen", "input": f"say {i}", "answer": "red"} for i in range(12)]
    free = {"name": "free", "source": str(write_rows(tmp_path / "free.jsonl", rows))}
    both = {**mixed, "parts": [mixed["parts"][0], free]}
    job = run_of(text_recipe("causal_lm", task=both, methods=["lora"]))
    model = model_of(job, "lora")
    found = evaluate(model, job.task)
    alone = evaluate(model, build_task(job.task.config.part_configs()[0], job.task.tokenizer))
    assert "accuracy" not in found.metrics
    assert "accuracy" not in found.parts["free"]
    for name in ("accuracy", "accuracy_per_character"):
        assert found.parts["colours"][name].value == alone.metrics[name].value
