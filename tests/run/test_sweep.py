"""The learning-rate sweep: chosen on held-out rows, at equal effort, with nothing trained twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from guilomo.allocation import Allocation
from guilomo.errors import GuilomoError
from guilomo.evaluation import evaluate
from guilomo.report import comparison_table, render
from guilomo.run import Run
from guilomo.run.dry import dry_run
from guilomo.run.files import read_json
from guilomo.training import Interrupted
from tiny_runs import StopAfter, colour_rows, recipe, run_of, without_times, write_rows

RATES = [1e-5, 5e-3, 1e30]
TRAIN = {"use_held_out": False, "max_grad_norm": 0.0}
CHANGES: dict[str, Any] = {"train": TRAIN, "sweep": {"learning_rates": RATES}, "seeds": [2, 1]}


@pytest.fixture(scope="module")
def finished(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two methods and seeds over three rates, the last of which diverges; read only."""
    task = {"kind": "classification", "source": str(colours), "name": "colours"}
    job = run_of(recipe(bert_folder, task, tmp_path_factory.mktemp("sweep"), **CHANGES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guilomo.run.pipeline.write_report", lambda results, path: None)
        job.all()
    return job


@pytest.fixture(scope="module")
def results(finished: Run) -> dict[str, Any]:
    found: dict[str, Any] = read_json(finished.config.folder / "results.json")
    return found


def folder_of(job: Run, method: str) -> Path:
    return job.config.folder / "methods" / method


@pytest.mark.parametrize("method", ["guilomo", "lora"])
def test_the_chosen_rate_has_the_lowest_held_out_loss(finished: Run, results: dict[str, Any], method: str) -> None:
    sweep = next(m for m in results["methods"] if m["name"] == method)["sweep"]
    assert [cell["learning_rate"] for cell in sweep["rates"]] == RATES
    losses = {cell["learning_rate"]: cell["loss"] for cell in sweep["rates"] if cell["loss"] is not None}
    assert sweep["chosen"] == min(losses, key=losses.__getitem__)
    assert sweep["seed"] == 2
    for rate, loss in losses.items():
        adapter = folder_of(finished, method) / "sweep" / f"lr-{rate}" / "adapter"
        model = PeftModel.from_pretrained(finished.fresh_model(7), str(adapter))
        scored = evaluate(model, finished.task, "held_out", finished.config.evaluation.batch_size)
        assert scored.metrics["loss"].value == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("method", ["guilomo", "lora"])
def test_a_rate_that_diverges_loses_and_says_why(results: dict[str, Any], method: str) -> None:
    sweep = next(m for m in results["methods"] if m["name"] == method)["sweep"]
    last = sweep["rates"][-1]
    assert last["loss"] is None
    assert "nan" in last["diverged"]
    assert [cell["diverged"] for cell in sweep["rates"][:-1]] == [None, None]
    assert sweep["chosen"] == 5e-3
    assert sweep["edge"] is False
    assert not any("beyond the grid" in sentence for sentence in results["verdict"])


@pytest.mark.parametrize("method", ["guilomo", "lora"])
def test_the_chosen_training_is_the_final_one(finished: Run, method: str) -> None:
    folder = folder_of(finished, method)
    cell, final = folder / "sweep" / "lr-0.005", folder / "seed-2"
    for name in ("allocation.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (cell / name).read_bytes() == (final / name).read_bytes()
    result = read_json(final / "result.json")
    training = read_json(cell / "held_out.json")["training"]
    assert {key: result[key] for key in training} == training


def test_a_run_at_the_chosen_rate_gives_the_same_numbers(finished: Run, colour_recipe: Any) -> None:
    """Taking the sweep's training over is the same as training anew."""
    plain = run_of(colour_recipe(train={**TRAIN, "learning_rate": 5e-3}, seeds=[2, 1]))
    found = plain.all()
    assert all(m["sweep"] is None for m in found["methods"])
    for method in ("guilomo", "lora"):
        for seed in (2, 1):
            names = folder_of(plain, method), folder_of(finished, method)
            a, b = (read_json(folder / f"seed-{seed}" / "result.json") for folder in names)
            assert without_times(a) == without_times(b)


def test_every_seed_is_trained_at_the_chosen_rate(results: dict[str, Any]) -> None:
    for method in results["methods"]:
        assert [(run["seed"], run["learning_rate"]) for run in method["runs"]] == [(2, 5e-3), (1, 5e-3)]
    assert set(results["seconds"]) == {"search", "sweep", "train", "total"}


def test_test_rows_have_no_say(colour_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other labels of the test rows, the same sweep; and only chosen trainings are scored on them."""
    found, calls = [], []
    monkeypatch.setattr(
        "guilomo.run.pipeline.evaluate", lambda *a, **k: calls.append(k.get("split", "test")) or evaluate(*a, **k)
    )
    for flipped in (False, True):
        source = tmp_path / str(flipped)
        source.mkdir()
        write_rows(source / "colours.train.jsonl", colour_rows(48, "train"))
        rows = [
            {**row, "label": row["label"] ^ flipped, "answer": row["choices"][row["label"] ^ flipped]}
            for row in colour_rows(20, "test")
        ]
        write_rows(source / "colours.test.jsonl", rows)
        changes = {"methods": ["lora"], "train": TRAIN, "sweep": {"learning_rates": RATES}}
        found.append(run_of(colour_recipe(f"run {flipped}", task={"source": str(source)}, **changes)).all())
    sweeps = [without_times(results["methods"][0]["sweep"]) for results in found]
    assert sweeps[0] == sweeps[1]
    assert found[0]["methods"][0]["summary"] != found[1]["methods"][0]["summary"]
    assert calls == ["test", "test"]


@pytest.mark.parametrize(
    ("stage", "steps", "done"),
    [("lora lr 0.005", 4, ["lora lr 1e-05"]), ("lora seed 1", 2, [f"lora lr {rate}" for rate in RATES])],
)
def test_a_stopped_sweep_continues_to_the_same_numbers(
    colour_recipe: Any, results: dict[str, Any], stage: str, steps: int, done: list[str]
) -> None:
    content = colour_recipe("cut", **CHANGES)
    with pytest.raises(Interrupted):
        run_of(content, StopAfter(stage, steps)).all()
    seen: set[str] = set()
    job = run_of(content, progress=lambda stage, *rest: seen.add(stage))
    assert without_times(job.all()) == without_times(results)
    assert stage in seen
    assert not seen & {"search", *(f"guilomo lr {rate}" for rate in RATES), *done}


def test_data_that_changed_are_noticed_by_the_sweep(colour_recipe: Any, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.mkdir()
    write_rows(source / "colours.test.jsonl", colour_rows(20, "test"))
    content = colour_recipe(methods=["lora"], task={"source": str(source)}, **CHANGES)
    for stop in ("lora lr 0.005", "lora seed 1"):  # within the sweep, and after it
        write_rows(source / "colours.train.jsonl", colour_rows(48, "train"))
        with pytest.raises(Interrupted):
            run_of(content, StopAfter(stop, 2)).all()
        write_rows(source / "colours.train.jsonl", colour_rows(47, "train"))
        with pytest.raises(GuilomoError, match="have changed since"):
            run_of(content).train(run_of(content).config.methods[0], 5)


def test_a_choice_at_the_edge_is_flagged(colour_recipe: Any) -> None:
    changes = {"methods": ["guilomo", "lora"], "train": TRAIN, "sweep": {"learning_rates": [1e-5, 5e-3]}}
    results = run_of(colour_recipe(**changes)).all()
    assert [m["sweep"]["edge"] for m in results["methods"]] == [True, True]
    assert results["verdict"][-1].endswith("for GuiLoMo (searched) and LoRA (PEFT): widen sweep.learning_rates.")
    assert render(results).count('<span>0.005 <span class="alarm">edge</span></span>') == 2
    table = comparison_table(results)
    assert list(table.columns[-1].cells) == ["0.005 edge", "0.005 edge"]


def test_a_held_out_loss_that_is_not_finite_loses(colour_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([float("nan"), 1.0, float("inf")])
    monkeypatch.setattr("guilomo.run.sweep.row_results", lambda *a: ([next(losses)], [1], []))
    changes = {"methods": ["lora"], "train": TRAIN, "sweep": {"learning_rates": [0.01, 0.02, 0.03]}}
    sweep = run_of(colour_recipe(**changes)).all()["methods"][0]["sweep"]
    assert [cell["loss"] for cell in sweep["rates"]] == [None, 1.0, None]
    assert sweep["rates"][0]["diverged"] == "The held-out loss was nan after the training."
    assert sweep["chosen"] == 0.02


def test_a_sweep_in_which_all_rates_diverge_is_an_error(colour_recipe: Any) -> None:
    content = colour_recipe(methods=["lora"], train=TRAIN, sweep={"learning_rates": [1e30, 1e31]})
    for _ in range(2):  # and again when continued
        with pytest.raises(GuilomoError, match=r"sweep\.learning_rates.*'lora' diverged at every one.*1e\+31: The"):
            run_of(content).all()


def test_a_sweep_needs_held_out_rows(colour_recipe: Any) -> None:
    changes = {"methods": ["lora"], "train": TRAIN, "sweep": {"learning_rates": RATES}}
    with pytest.raises(GuilomoError, match=r"no held-out rows\. Raise task\.held_out_fraction"):
        run_of(colour_recipe(task={"held_out_fraction": 0.0}, **changes)).all()


def test_a_dry_run_counts_the_sweep(colour_recipe: Any) -> None:
    summary = dry_run(run_of(colour_recipe(**CHANGES))).summary
    assert "2 methods × 3 learning rates with seed 2: 4 trainings more" in summary


def test_the_random_control_sweeps_the_plan_of_its_first_seed(colour_recipe: Any) -> None:
    job = run_of(colour_recipe(methods=["random"], train=TRAIN, sweep={"learning_rates": [1e-3, 5e-3]}, seeds=[4, 5]))
    job.all()
    folder = folder_of(job, "random")
    names = ("sweep/lr-0.001", "sweep/lr-0.005", "seed-4", "seed-5")
    plans = [Allocation.load(folder / name / "allocation.json") for name in names]
    assert plans[0] == plans[1] == plans[2]
    assert plans[2] != plans[3]


@pytest.mark.parametrize(("added", "trained"), [(5e-3, 2), (1e-6, 1)], ids=["better", "worse"])
def test_added_rates_lead_to_what_all_of_them_give(
    added: float, trained: int, bert_folder: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A better rate is trained for the sweep and for the other seed; a worse one for the sweep alone."""
    monkeypatch.setattr("guilomo.run.pipeline.write_report", lambda results, path: None)
    task = {"kind": "classification", "source": str(colours), "name": "colours"}

    def make(folder: str, rates: list[float]) -> Run:
        changes = {**CHANGES, "sweep": {"learning_rates": rates}, "methods": ["lora"]}
        return run_of(recipe(bert_folder, task, tmp_path / folder, **changes))

    first, grid = make("grown", [1e-5, 1e-3]), [1e-5, 1e-3, added]
    first.prepare(resume=False)
    first.all()
    fits: list[float] = []
    original = Run.fit

    def counted(self: Run, method: Any, seed: int, rate: float, folder: Path, stage: str) -> Any:
        fits.append(rate)
        return original(self, method, seed, rate, folder, stage)

    monkeypatch.setattr(Run, "fit", counted)
    grown = make("grown", grid)
    grown.prepare(resume=True)
    results = grown.all()
    assert fits == [added] * trained
    whole = make("whole", grid).all()
    assert without_times(results) == without_times(whole)
    assert not list(grown.config.folder.rglob("*waiting*"))
