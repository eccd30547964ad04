"""`guilomo bank`, from a folder of adapters to a trained mixture: what it prints, writes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import guilomo.run.bank
from bank_tools import replace_adapter, save_bank_of
from guilomo.cli import main
from guilomo.run.files import read_json
from guilomo.training import fine_tune
from tiny_runs import write_recipe

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 2},
    "b": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "c": {"r": 3, "use_rslora": True},
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bank(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    return save_bank_of(model, tmp_path_factory.mktemp("bank"), ADAPTERS)


@pytest.fixture
def recipe_file(text_recipe: Any, tmp_path: Path) -> str:
    return str(write_recipe(tmp_path / "r.yaml", text_recipe("causal_lm")))


def test_list(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bank", "list", str(bank)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["adapter", "kind", "modules"]
    assert [line.split()[:4] for line in printed[1:4]] == [
        ["a", "LORA", "4", "2"],
        ["b", "LORA", "4", "4"],
        ["c", "LORA", "4", "3"],
    ]
    assert main(["bank", "list", str(bank), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert rows[1]["scales"] == [1.5, 1.5]


def test_list_says_what_cannot_become_an_expert(
    bank: Path, recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bank"
    assert main(["bank", "build", recipe_file, "--bank", str(bank), "--output", str(folder / "m"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["bank", "list", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "m: adapter 'm': peft_type = 'MOLORA'" in printed
    assert main(["bank", "list", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["experts"] == ["a", "b", "c"]


def test_select_build_fit_evaluate_and_inspect(
    bank: Path, recipe_file: str, llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen, output = tmp_path / "selection.json", tmp_path / "mixture"
    select = ["bank", "select", recipe_file, "--bank", str(bank), "--count", "2", "--k", "8", "--save", str(chosen)]
    assert main(select) == 0
    printed = capsys.readouterr().out
    for part in ("score adapters: 3/3", "accuracy", "rank sum", "Scored on 8 training rows of colours.", "chosen: "):
        assert part in printed
    names = read_json(chosen)["chosen"]
    assert len(names) == 2
    build = ["bank", "build", recipe_file, "--selection", str(chosen), "--output", str(output), "--fit"]
    assert main(build) == 0
    printed = capsys.readouterr().out
    assert "fit: 5/5" in printed
    assert f"experts  {names[0]}, {names[1]}" in printed
    assert "at random" not in printed
    report = read_json(output / "bank.json")
    assert list(report["adapters"]) == names
    assert report["selection"] == read_json(chosen)
    assert report["fitted"]["steps"] == 5
    assert 0 < report["trained_parameters"] < report["parameters"]
    assert not output.with_name("mixture.training").exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), str(output))
    assert model.peft_config["default"].expert_names == names
    assert model.peft_config["default"].train == "router"
    assert main(["evaluate", recipe_file, "--adapter", str(output), "--quiet"]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["inspect", str(output)]) == 0
    assert f"experts  0 {names[0]}, 1 {names[1]}" in capsys.readouterr().out


def test_select_prints_json(bank: Path, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bank", str(bank), "--by", "manual", "--names", "c, a", "--json", "--quiet"]
    assert main(["bank", "select", recipe_file, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == ["c", "a"]


def test_build_without_training_keeps_the_adapters(
    bank: Path, recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mixture"
    arguments = ["--bank", str(bank), "--names", "c,b", "--output", str(output), "--train", "all", "--top-k", "1"]
    assert main(["bank", "build", recipe_file, *arguments, "--quiet"]) == 0
    assert "choose at random: train them" in capsys.readouterr().out
    weights = load_file(output / WEIGHTS)
    down = "base_model.model.model.layers.0.mlp.down_proj"
    single = load_file(bank / "b" / WEIGHTS)
    assert torch.equal(weights[f"{down}.molora_A"][1:], single[f"{down}.lora_A.weight"])
    assert torch.equal(weights[f"{down}.molora_B"][:, 1:], 1.5 * single[f"{down}.lora_B.weight"])
    assert read_json(output / "bank.json")["fitted"] is None


def test_build_takes_the_adapters_that_were_selected_or_none(
    bank: Path, recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, chosen = Path(shutil.copytree(bank, tmp_path / "own")), str(tmp_path / "selection.json")
    manual = ["--bank", str(own), "--by", "manual", "--names", "b,c", "--save", chosen, "--quiet"]
    assert main(["bank", "select", recipe_file, *manual]) == 0
    replace_adapter(own / "c")

    def build(output: str, *more: str) -> int:
        arguments = ["--selection", chosen, "--output", str(tmp_path / output), "--quiet", *more]
        return main(["bank", "build", recipe_file, *arguments])

    assert build("replaced") == 2
    said = capsys.readouterr().err
    assert f"Adapter 'c' in {own / 'c'} is not the one that was chosen" in said
    assert "choose again with guilomo bank select" in said
    assert not (tmp_path / "replaced").exists()
    shutil.rmtree(own)
    assert build("gone") == 2
    assert build("moved", "--bank", str(bank)) == 0
    assert read_json(tmp_path / "moved" / "bank.json")["adapters"] == {n: str(bank / n) for n in ("b", "c")}


def test_a_fit_that_was_stopped_ends_in_the_same_weights(
    bank: Path, recipe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(output: str, *more: str) -> list[str]:
        folder = str(tmp_path / output)
        return ["bank", "build", recipe_file, "--bank", str(bank), "--output", folder, "--fit", "--quiet", *more]

    def stopping(*args: Any, **options: Any) -> Any:
        seen: list[int] = []
        return fine_tune(*args, **{**options, "should_stop": lambda: seen.append(1) or len(seen) == 2})

    assert main(arguments("straight")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(guilomo.run.bank, "fine_tune", stopping)
        assert main(arguments("stopped")) == 130
    assert "--resume" in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()
    assert main(arguments("stopped")) == 2
    assert "Continue it with --resume" in capsys.readouterr().err
    other = shutil.copytree(bank, tmp_path / "other")
    assert main(arguments("stopped", "--bank", str(other), "--resume")) == 2
    assert "made with other settings" in capsys.readouterr().err
    assert main(arguments("stopped", "--resume")) == 0
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("straight", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_heads_of_classifiers(
    bert_folder: Path, colour_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(bert_folder, num_labels=2)
    adapters = {name: {"target_modules": ["query"], "task_type": "SEQ_CLS"} for name in ("a", "b")}
    bank = save_bank_of(base, tmp_path / "bank", adapters)
    path = write_recipe(tmp_path / "r.yaml", colour_recipe())
    arguments = ["bank", "build", str(path), "--bank", str(bank), "--output", str(tmp_path / "m"), "--quiet"]
    assert main(arguments) == 0
    head = "base_model.model.classifier.weight"
    assert torch.equal(load_file(tmp_path / "m" / WEIGHTS)[head], load_file(bank / "b" / WEIGHTS)[head])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list", "nowhere"], "bank = 'nowhere' is not usable"),
        (["select", "RECIPE", "--bank", "nowhere"], "bank = 'nowhere' is not usable"),
        (["select", "RECIPE", "--bank", "BANK", "--by", "luck"], "by = 'luck'"),
        (["select", "RECIPE", "--bank", "BANK", "--count", "7"], "count = 7"),
        (["select", "RECIPE", "--bank", "BANK", "--count", "1", "--k", "999"], "k = 999"),
        (["build", "RECIPE", "--output", "OUT"], "--bank = None"),
        (["build", "RECIPE", "--output", "BANK", "--bank", "BANK"], "a folder that is empty or not there"),
        (["build", "RECIPE", "--output", "OUT", "--bank", "BANK", "--names", "a,z"], "--names = 'z'"),
        (["build", "RECIPE", "--output", "OUT", "--bank", "BANK", "--router", "topl"], "Did you mean 'topk'"),
        (["build", "RECIPE", "--output", "OUT", "--selection", "RECIPE"], "cannot be read as a selection"),
        (["build", "RECIPE", "--output", "OUT", "--bank", "BANK", "--names", "a"], "leaves nothing to train"),
        (["build", "RECIPE", "--output", "OUT", "--bank", "BANK", "--set", "model.path=BERT"], "module = 'model."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_return_2_and_say_what_to_change(
    bank: Path,
    recipe_file: str,
    bert_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = {"RECIPE": recipe_file, "BANK": str(bank), "OUT": str(tmp_path / "out")}
    given = [words.get(part, part.replace("BERT", str(bert_folder))) for part in arguments]
    if "BERT" in " ".join(arguments):
        given += ["--set", "task.kind=classification"]
    assert main(["bank", *given]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert says in printed
    assert not (tmp_path / "out").exists()
