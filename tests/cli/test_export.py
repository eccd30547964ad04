"""`guilomo export`, from a finished run to a folder that is served: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from guilomo.cli import main
from guilomo.run.files import read_json
from tiny_runs import quicken_page, recipe, write_recipe


def _run(base: Path, colours: Path, folder: Path, **changes: Any) -> Path:
    task = {"kind": "classification", "source": str(colours), "name": "colours"}
    path = write_recipe(folder / "r.yaml", recipe(base, task, folder / "out", **changes))
    with pytest.MonkeyPatch.context() as patch:
        quicken_page(patch)
        assert main(["run", str(path), "--quiet"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def routed(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a token-routed mixture and of plain LoRA with two seeds; long enough to gain something."""
    train = {"max_steps": 40, "learning_rate": 0.02}
    folder = tmp_path_factory.mktemp("routed")
    return _run(bert_folder, colours, folder, methods=["uniform", "lora"], seeds=[2, 10], train=train)


@pytest.fixture(scope="module")
def constant(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one method, a mixture whose gates are constant."""
    mixture = {"router": "fixed"}
    return _run(bert_folder, colours, tmp_path_factory.mktemp("constant"), methods=["uniform"], mixture=mixture)


def test_stacked(routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "lora"
    arguments = ["--method", "uniform", "--seed", "10", "--output", str(output), "--rows", "16"]
    assert main(["export", str(routed), *arguments]) == 0
    printed = capsys.readouterr().out
    for part in ("gates on train rows: 16/16", "loss on test rows: 16/16", "loss added by the export", str(output)):
        assert part in printed
    report = read_json(output / "export.json")
    assert (report["gates_from"], report["head_saved"]) == ({"split": "train", "rows": 16}, True)
    assert (report["measured_on"]["split"], report["measured_on"]["rows"]) == ("test", 16)
    for module in report["modules"].values():
        assert sum(module["gates"]) == pytest.approx(1, abs=1e-6)
        used = sum(gate > 0 for gate in module["gates"])
        assert (module["rank"], module["energy"]) == (4 * used, 1.0)
    assert "The gates are means over 16 train rows" in printed
    assert "The gates are means over 16 train rows" in (output / "README.md").read_text(encoding="utf-8")


def test_the_mixture_is_scored_as_in_the_run(routed: Path, bert_folder: Path, tmp_path: Path) -> None:
    """All test rows: its loss is the run's. The written folder is a LoRA of the base model, with the trained head."""
    seed, output = routed / "methods" / "uniform" / "seed-2", tmp_path / "lora"
    assert main(["export", str(seed), "--to", "svd", "--rank", "3", "--uniform-rank", "--output", str(output)]) == 0
    report = read_json(output / "export.json")
    wanted = read_json(seed / "result.json")["metrics"]["loss"]
    assert report["measures"]["loss_routed"] == pytest.approx(wanted, abs=1e-6)
    assert all(module["energy"] < 1 for module in report["modules"].values())
    config = read_json(output / "adapter_config.json")
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["rank_pattern"]) == ("LORA", 3, 3, {})
    loaded = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(str(bert_folder)), str(output))
    head = load_file(seed / "adapter" / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(loaded.base_model.model.classifier.modules_to_save["default"].weight, head)


@pytest.mark.parametrize("form", ["stacked", "merged"])
def test_constant_gates_lose_nothing(constant: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(constant), "--to", form, "--quiet"]) == 0
    assert "freezing them loses nothing" in capsys.readouterr().out
    output = constant / "methods" / "uniform" / "seed-0" / f"export-{form}"
    report = read_json(output / "export.json")
    assert report["gates_from"] is None
    assert report["measures"]["agreement"]["value"] == 1.0
    assert abs(report["measures"]["loss_added"]["value"]) < 1e-6
    if form == "merged":
        merged = BertForSequenceClassification.from_pretrained(str(output))
        assert "lora" not in " ".join(merged.state_dict())
        assert (output / "tokenizer.json").is_file()


def test_another_task_and_split(constant: Path, colour_recipe: Any, tmp_path: Path) -> None:
    """An adapter that has left its run, measured on the data of a recipe."""
    path = write_recipe(tmp_path / "other.yaml", colour_recipe(task={"held_out_fraction": 0.5}))
    adapter, output = constant / "methods" / "uniform" / "seed-0" / "adapter", tmp_path / "lora"
    moved = tmp_path / "a"
    moved.symlink_to(adapter)
    arguments = ["--recipe", str(path), "--split", "held_out", "--output", str(output), "--quiet"]
    assert main(["export", str(moved), *arguments]) == 0
    rows = read_json(output / "export.json")["measured_on"]
    assert (rows["split"], rows["rows"]) == ("held_out", 24)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "a run folder with a trained method"),
        (["RUN"], "Say which with --method: lora, uniform."),
        (["RUN", "--method", "unifrom"], "Did you mean 'uniform'"),
        (["RUN", "--method", "uniform", "--seed", "3"], "one of 10, 2"),
        (["RUN", "--method", "lora"], "is a LORA adapter; only mixtures are exported"),
        (["RUN", "--method", "uniform", "--to", "merged"], "Or export it to plain LoRA"),
        (["RUN", "--method", "uniform", "--to", "svd"], "rank = None is not usable"),
        (["RUN", "--method", "uniform", "--rank", "4"], "rank = 4 is not usable"),
        (["RUN", "--method", "uniform", "--to", "svd", "--rank", "17"], "from 1 to 16, the highest rank"),
        (["RUN", "--method", "uniform", "--to", "merged", "--uniform-rank"], "Merged weights have no rank"),
        (["RUN", "--method", "uniform", "--split", "train"], "one of held_out, test"),
        (["RUN", "--method", "uniform", "--rows", "0"], "rows = 0 is not usable"),
        (["RUN", "--method", "uniform", "--output", "RUN"], "a folder that is empty or not there"),
        (["COPY"], "is not part of a run. Name a recipe"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_return_2_and_say_what_to_change(
    routed: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in (routed / "methods" / "uniform" / "seed-2" / "adapter").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    words = {"RUN": str(routed), "COPY": str(copy)}
    places = [words.get(part, part) for part in arguments]
    default = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    assert main(["export", *places, *default, "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert says in printed
    assert not (tmp_path / "out").exists()


def test_data_that_have_changed_are_refused(constant: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = constant / "methods" / "uniform" / "seed-0" / "result.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), "data_hash": "another"}), encoding="utf-8")
    try:
        assert main(["export", str(constant)]) == 2
    finally:
        path.write_text(before, encoding="utf-8")
    assert "have changed since" in capsys.readouterr().err


def test_a_run_of_another_version_needs_its_recipe(
    constant: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = constant / "config.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), "strange": 1}), encoding="utf-8")
    try:
        assert main(["export", str(constant), "--output", str(tmp_path / "out")]) == 2
    finally:
        path.write_text(before, encoding="utf-8")
    assert "strange is not a known key" in (printed := capsys.readouterr().err)
    assert "name its recipe: --recipe FILE" in printed


def test_help_says_what_each_form_trades_off(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for part in ("stacked  exact at the mean gates", "svd      the nearest change of rank R", "merged   a whole model"):
        assert part in printed
