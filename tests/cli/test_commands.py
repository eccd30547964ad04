"""Every command, called as the console script calls it: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import guilomo
from guilomo.allocation import Allocation
from guilomo.cli import main
from guilomo.cli.options import option_rows
from guilomo.cli.progress import _lines
from guilomo.errors import GuilomoError
from guilomo.run import RunConfig
from guilomo.run.files import read_json
from tiny_runs import quicken_page, recipe, write_recipe

COMMANDS = ["run", "search", "allocate", "train", "evaluate"]


@pytest.fixture(scope="module")
def finished(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe and the folder of its complete run."""
    folder = tmp_path_factory.mktemp("cli")
    task = {"kind": "classification", "source": str(colours), "name": "colours"}
    path = write_recipe(folder / "r.yaml", recipe(bert_folder, task, folder / "out"))
    with pytest.MonkeyPatch.context() as patch:
        quicken_page(patch)
        assert main(["run", str(path), "--quiet"]) == 0
    return str(path), folder / "out"


@pytest.fixture
def path(colour_recipe: Any, tmp_path: Path) -> str:
    """A recipe of which nothing has been done."""
    return str(write_recipe(tmp_path / "r.yaml", colour_recipe()))


def test_run_prints_the_comparison_and_where_it_lies(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", path]) == 0
    printed = capsys.readouterr().out
    for part in ("GuiLoMo (searched)", "LoRA (PEFT)", "Accuracy", "search: 6/6", "guilomo seed 0: 5/5", "report.html"):
        assert part in printed
    assert "…" not in printed
    results = read_json(Path(path).parent / "run" / "results.json")
    assert results["command"] == f"guilomo run {path}"
    assert main(["run", path]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["run", path, "--resume", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "GuiLoMo (searched)" in printed
    assert "seed 0" not in printed


@pytest.mark.parametrize("command", [["run"], ["search"], ["train", "--method", "lora"]])
def test_a_dry_run_trains_and_writes_nothing(path: str, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, path, "--dry-run", "--quiet", "--set", "train.accumulation=2"]) == 0
    printed = capsys.readouterr().out
    for part in ("lora: ", "36 training, 12 held-out, 20 test rows", "× 1 seed × 5 steps", "5 experts × rank 6"):
        assert part in printed
    assert not (Path(path).parent / "run").exists()


def test_a_dry_run_counts_steps_as_trainer_does(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["train.max_steps=null", "train.epochs=3", "train.batch_size=10", "train.accumulation=2"]
    assert main(["run", path, "--dry-run", *(part for c in changes for part in ("--set", c))]) == 0
    assert "× 9 steps" in capsys.readouterr().out  # 48 rows: 5 batches, 3 optimiser steps, 3 times


def test_search_alone(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", path, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "bert.encoder.layer.1.attention.self.query" in printed
    assert "of 16,128 parameters" in printed
    folder = Path(path).parent / "run"
    plan = Allocation.load(folder / "search" / "allocation.json")
    results = read_json(folder / "results.json")
    assert results["status"] == "partial"
    assert [m["name"] for m in results["methods"]] == ["guilomo"]
    assert results["methods"][0]["allocation"] == plan.to_dict()
    assert main(["run", path, "--resume", "--quiet"]) == 0


def test_allocate(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, drawn = tmp_path / "plan.json", tmp_path / "plan.svg"
    options = ["--strategy", "mola", "--option", "groups=[2, 3]", "--save", str(saved), "--plot", str(drawn)]
    assert main(["allocate", path, *options]) == 0
    printed = capsys.readouterr().out
    plan = Allocation.load(saved)
    assert {m.experts for m in plan.modules.values()} == {2, 3}
    assert f"{plan.parameters():,} of 16,128 parameters (uniform 4 experts × rank 4)" in printed
    assert drawn.read_text().startswith("<?xml")
    assert main(["inspect", str(saved)]) == 0
    assert not (Path(path).parent / "run").exists()


@pytest.mark.parametrize("strategy", ["uniform", "lora", "random", "normal", "alphalora"])
def test_allocate_with_each_strategy(path: str, strategy: str) -> None:
    assert main(["allocate", path, "--strategy", strategy]) == 0


def test_train_one_method(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", path, "--method", "lora", "--set", "seeds=[4, 5]"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    folder = Path(path).parent / "run"
    assert (folder / "methods" / "lora" / "seed-4" / "adapter" / "adapter_config.json").is_file()
    assert not (folder / "search").exists()
    assert read_json(folder / "results.json")["status"] == "partial"
    assert main(["train", path, "--method", "lora", "--seed", "5", "--resume", "--set", "seeds=[4, 5]"]) == 0


def test_evaluate_gives_the_scores_of_the_run(
    finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_path, folder = finished
    one = folder / "methods" / "guilomo" / "seed-0"
    written = tmp_path / "scores.json"
    assert main(["evaluate", recipe_path, "--adapter", str(one / "adapter"), "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    assert "test: 20/20" in printed
    found = read_json(written)
    assert found["metrics"] == read_json(one / "result.json")["metrics"]
    assert found["split"] == "test"
    assert main(["evaluate", recipe_path, "--adapter", str(one / "adapter"), "--split", "held_out", "--quiet"]) == 0


@pytest.mark.parametrize("kind", ["adapter", "run", "file"])
def test_inspect(finished: tuple[str, Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished[1]
    places = {
        "adapter": folder / "methods" / "guilomo" / "seed-0" / "adapter",
        "run": folder,
        "file": folder / "search" / "allocation.json",
    }
    assert main(["inspect", str(places[kind]), "--plot", str(tmp_path / "x.png")]) == 0
    assert "bert.encoder.layer.0.output.dense" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 1000
    assert main(["inspect", str(places[kind]), "--json"]) == 0
    plan = Allocation.from_dict(json.loads(capsys.readouterr().out))
    assert plan.modules == Allocation.load(places["file"]).modules


def test_inspect_shows_differences(finished: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished[1]
    assert main(["inspect", str(folder), "--diff", str(folder / "methods" / "lora" / "seed-0")]) == 0
    assert "bert.pooler.dense" in capsys.readouterr().out
    assert main(["inspect", str(folder), "--diff", str(folder)]) == 0
    assert "no difference" in capsys.readouterr().out


def test_report(finished: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, picture = finished[1], tmp_path / "headline.svg"
    assert main(["report", str(folder), "--picture", str(picture)]) == 0
    assert "GuiLoMo (searched)" in (folder / "report.html").read_text(encoding="utf-8")
    assert picture.is_file()
    assert str(picture) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nosuch.yaml"], "There is no recipe at nosuch.yaml"),
        (["run", "RECIPE", "--set", "search.stepz=1"], "Did you mean 'steps'"),
        (["allocate", "RECIPE", "--strategy", "mole"], "Did you mean 'mola'"),
        (["allocate", "RECIPE", "--strategy", "mola", "--option", "groups"], "key=value"),
        (["allocate", "RECIPE", "--save", "/nowhere/at/all.json"], "/nowhere/at/all.json"),
        (["allocate", "RECIPE", "--plot", "x.gif"], ".png, .svg, .pdf"),
        (["train", "RECIPE", "--method", "loro"], "Did you mean 'lora'"),
        (["evaluate", "RECIPE", "--adapter", "nowhere"], "adapter_config.json"),
        (["evaluate", "RECIPE", "--adapter", "ADAPTER", "--split", "tset"], "Did you mean 'test'"),
        (
            ["evaluate", "RECIPE", "--adapter", "ADAPTER", "--set", "model.path=LLAMA"],
            "one of the model's 15 linear",
        ),
        (["evaluate", "RECIPE", "--adapter", "ADAPTER", "--lm-eval", "x"], "lm-eval scores language models"),
        (["inspect", "nowhere"], "an adapter folder, a run folder"),
        (["inspect", "RECIPE"], "not a JSON object"),
        (["inspect", "LORA"], "is a LORA adapter"),
        (["inspect", "ADAPTER/adapter_model.safetensors"], "not text"),
        (["report", "nowhere"], "results.json does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_return_2_and_say_what_to_change(
    finished: tuple[str, Path],
    llama_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    methods = finished[1] / "methods"
    words = {
        "RECIPE": finished[0],
        "ADAPTER": str(methods / "guilomo" / "seed-0" / "adapter"),
        "LORA": str(methods / "lora" / "seed-0" / "adapter"),
        "LLAMA": str(llama_folder),
    }
    if arguments[0] != "run" and "train" in arguments:
        arguments = [*arguments, "--set", f"output={tmp_path / 'other'}"]
    for word, meant in words.items():
        arguments = [part.replace(word, meant) for part in arguments]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.startswith("error: ")
    assert "Traceback" not in printed


BROKEN: dict[str, tuple[str, bytes | None, str]] = {
    "no JSON": ("adapter_config.json", b'{"peft_type": ', "adapter_config.json is not readable as JSON"),
    "a list": ("adapter_config.json", b"[]", "adapter_config.json holds a list"),
    "strange method": ("adapter_config.json", b'{"peft_type": "MOLORRA"}', "Did you mean 'MOLORA'"),
    "strange plan": ("adapter_config.json", b'{"peft_type": "MOLORA", "allocation": 3}', "adapter_config.json"),
    "no weights": ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
    "damaged weights": ("adapter_model.safetensors", b"nothing at all", "adapter_model.safetensors is damaged"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_a_broken_adapter_says_which_file(
    finished: tuple[str, Path], tmp_path: Path, command: str, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, says = BROKEN[case]
    folder = tmp_path / "adapter"
    shutil.copytree(finished[1] / "methods" / "guilomo" / "seed-0" / "adapter", folder)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    if command == "inspect" and case == "no weights":
        assert main(["inspect", str(folder)]) == 0  # the allocation lies in the configuration
        return
    arguments = [str(folder)] if command == "inspect" else [finished[0], "--adapter", str(folder), "--quiet"]
    assert main([command, *arguments]) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("content", ["[]", "{}"])
def test_a_report_of_something_else_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert "a mapping with the key 'schema'" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_texts_that_were_cut_are_counted(path: str, more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["task.max_length=8", "methods=[lora]", "train.max_steps=1"]
    assert main(["run", path, "--quiet", *more, *(part for c in changes for part in ("--set", c))]) == 0
    assert re.search(r"[1-9]\d* texts were cut at task\.max_length = 8", capsys.readouterr().out)


def test_nothing_cut_is_not_mentioned(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", path, "--dry-run", "--quiet"]) == 0
    assert "cut at" not in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "x.yaml"], ["run", "--nosuch"]])
def test_bad_arguments_return_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: guilomo" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_key_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    rows = option_rows(RunConfig)
    assert len(rows) > 60
    for key, default, text in rows:
        assert f"  {key}  [{default}]" in printed
        assert text
    assert "search.steps  [300]" in printed
    assert "methods  [guilomo, lora, uniform, random]" in printed


def test_help_explains_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for code in ("0 done", "1 an unexpected failure: a bug, please report it", "2 bad arguments", "130 stopped"):
        assert code in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"guilomo {guilomo.__version__}\n"


def test_stopping_returns_130(path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal during the search: the step is finished and saved, and --resume goes on from there."""
    from guilomo.search import Search

    step = Search._one_step
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background of a shell

    def interrupted(self: Search) -> str:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Search, "_one_step", interrupted)
        assert main(["run", path]) == 130
    printed = capsys.readouterr().err
    assert "Stopping after this step" in printed
    assert "stopped at step 3 of 6" in printed
    assert "--resume" in printed
    assert signal.getsignal(signal.SIGINT) is before
    assert main(["run", path, "--resume", "--quiet"]) == 0


def test_a_second_signal_stops_at_once(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from guilomo.search import Search

    def twice(self: Search) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Search, "_one_step", twice)
    assert main(["run", path]) == 130
    assert "Stopped at once" in capsys.readouterr().err


def test_warnings_are_shown_without_source_lines(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def warn(arguments: Any) -> None:
        warnings.simplefilter("always")
        warnings.warn("mind [this]", stacklevel=1)

    monkeypatch.setattr("guilomo.cli.commands.report", warn)
    assert main(["report", "x"]) == 0
    assert capsys.readouterr().err == "warning: mind [this]\n"


def test_lines_of_progress_come_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    clock = iter([0.0, 4.0, 11.0, 15.0, 40.0])
    monkeypatch.setattr("guilomo.cli.progress.time.monotonic", lambda: next(clock))
    report = _lines(Console(soft_wrap=True))
    for step in (1, 2, 3, 4, 10):
        report("search", step, 10, "loss 1.0")
    assert capsys.readouterr().out.splitlines() == [
        "search: 3/10, 26 s left  loss 1.0",
        "search: 10/10, 40 s  loss 1.0",
    ]


@pytest.mark.slow
def test_the_console_script() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "guilomo.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert found.stdout == f"guilomo {guilomo.__version__}\n"


@pytest.mark.slow
def test_ctrl_c_on_a_real_process(path: str) -> None:
    """SIGINT in the middle saves, returns 130, and --resume finishes."""
    command = [sys.executable, "-m", "guilomo.cli", "run", path, "--set", "search.steps=120"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    settings = ["--set", "search.patience=0", "--set", "search.checkpoint_every=1"]
    process = subprocess.Popen([*command, *settings], env=environment, stdout=-1, stderr=-1, text=True)
    saved = Path(path).parent / "run" / "search" / "search.safetensors"
    while not saved.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert read_json(saved.parents[1] / "results.json")["status"] == "partial"
    again = subprocess.run(
        [*command, *settings, "--resume"], env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert read_json(saved.parents[1] / "results.json")["status"] == "complete"
    assert again.stderr == ""


TASK = """
task: guilomo_colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness and its dependencies are not ours to clean
def test_evaluate_with_lm_eval(
    text_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = str(write_recipe(tmp_path / "r.yaml", text_recipe("causal_lm", methods=["uniform"])))
    assert main(["run", path, "--quiet"]) == 0
    rows = [{"question": f"Colour {i}?", "choices": ["red", "green"], "label": i % 2} for i in range(8)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "colours.yaml").write_text(TASK.format(data=tmp_path / "rows.json"))
    adapter = tmp_path / "run" / "methods" / "uniform" / "seed-0" / "adapter"
    harness = ["--lm-eval", "guilomo_colours", "--include-path", str(tmp_path / "harness"), "--limit", "6"]
    written = tmp_path / "scores.json"
    capsys.readouterr()
    assert main(["evaluate", path, "--adapter", str(adapter), *harness, "--json", str(written)]) == 0
    found = read_json(written)
    assert 0 <= found["results"]["guilomo_colours"]["acc,none"] <= 1
    assert found["n-samples"]["guilomo_colours"]["effective"] == 6


def test_errors_are_value_errors() -> None:
    """Callers of the library may catch the built-in class."""
    assert issubclass(GuilomoError, ValueError)
