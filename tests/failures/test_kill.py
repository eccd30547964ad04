"""A run killed outright at any moment continues to the same numbers and repeats at most the step it was in."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import Moment, count_steps, killed, needs_fork
from safetensors.torch import load_file

from guilomo.files import load_state
from guilomo.report import write_report
from guilomo.run.files import read_json
from guilomo.search import SearchConfig
from guilomo.training import TrainConfig
from tiny_runs import quicken_page, recipe, run_of, without_times, write_recipe

pytestmark = [
    needs_fork,
    # Python 3.12 warns of forks beside threads; the forked process uses none of them.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

SEARCH, TRAIN = 6, 5
EVERY_STEP: dict[str, Any] = {"search": {"checkpoint_every": 1}, "train": {"save_every": 1}, "methods": ["guilomo"]}
FILES = {
    "step": SEARCH + TRAIN,
    "search.safetensors": SEARCH,
    "training.safetensors": TRAIN,
    "allocation.json": 2,
    "search.json": 1,
    "adapter": 1,
    "result.json": 1,
    "results.json": 1,
}
"""What a run of one method writes, and how often."""


@pytest.fixture(scope="module")
def whole(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    task = {"kind": "classification", "source": str(colours), "name": "colours"}
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        quicken_page(patch)
        count_steps(folder / "steps", patch.setattr)
        run_of(recipe(bert_folder, task, folder / "run", **EVERY_STEP)).all()
    assert (folder / "steps").stat().st_size == SEARCH + TRAIN
    return folder / "run"


def same_run(found: Path, wanted: Path) -> None:
    assert without_times(read_json(found / "results.json")) == without_times(read_json(wanted / "results.json"))
    for weights in wanted.rglob("adapter_model.safetensors"):
        assert (found / weights.relative_to(wanted)).read_bytes() == weights.read_bytes()


def survives(content: dict[str, Any], moments: list[Moment], log: Path, patch: pytest.MonkeyPatch) -> Path:
    """Kills the run at each moment in turn, continues it to its end, and counts the steps it took in all."""

    def work() -> None:
        job = run_of(content)
        job.prepare(resume=True)
        job.all()

    for moment in moments:
        killed(work, moment, log)
    count_steps(log, patch.setattr)
    work()
    assert SEARCH + TRAIN <= log.stat().st_size <= SEARCH + TRAIN + len(moments)
    return Path(content["output"])


@pytest.mark.parametrize(
    "moment",
    [
        Moment("step", 3, "after"),
        Moment("step", SEARCH + 2, "after"),
        Moment("search.safetensors", 4, "half"),
        Moment("training.safetensors", 1, "half"),
        Moment("training.safetensors", TRAIN, "after"),
        Moment("adapter", 1, "half"),
    ],
    ids=str,
)
def test_killed_once(
    moment: Moment, colour_recipe: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same_run(survives(colour_recipe(**EVERY_STEP), [moment], tmp_path / "steps", monkeypatch), whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_killed_at_random_moments(
    seed: int, colour_recipe: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    moments = []
    # In the order in which they come, so that each of them does come in a run that continues.
    for what in sorted(draw.sample(list(FILES)[1:], 2), key=list(FILES).index):
        moments.append(Moment(what, 1, draw.choice(["before", "half", "after"])))
    first = Moment("step", draw.randint(1, SEARCH), draw.choice(["before", "after"]))
    if moments[0].what != "search.safetensors":
        moments.insert(0, first)
    same_run(survives(colour_recipe(**EVERY_STEP), moments, tmp_path / "steps", monkeypatch), whole)


def test_unless_told_otherwise_every_step_is_saved() -> None:
    assert SearchConfig().checkpoint_every == TrainConfig().save_every == 1


def test_half_a_checkpoint_leaves_the_one_before(colour_recipe: Any, tmp_path: Path) -> None:
    content = colour_recipe(**EVERY_STEP)
    killed(lambda: run_of(content).search(), Moment("search.safetensors", 4, "half"), tmp_path / "steps")
    assert load_state(Path(content["output"]) / "search" / "search.safetensors")[1]["step"] == 3


def test_half_an_adapter_is_never_seen(colour_recipe: Any, tmp_path: Path) -> None:
    content = colour_recipe(**{**EVERY_STEP, "methods": ["lora"]})
    killed(lambda: run_of(content).all(), Moment("adapter", 1, "half"), tmp_path / "steps")
    assert list(Path(content["output"]).rglob("adapter")) == []


@pytest.mark.usefixtures("real_page")
def test_half_a_report_is_never_seen(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    writes = [("first", "half", None), ("first", "after", "first"), ("second", "half", "first")]
    for name, when, seen in writes:
        results, moment = {"schema": 1, "name": name}, Moment("report.html", 1, when)
        killed(partial(write_report, results, page), moment, tmp_path / "steps")
        assert page.exists() == (seen is not None)
    text = page.read_text(encoding="utf-8")
    assert "<title>first" in text
    assert text.rstrip().endswith("</html>")


@pytest.mark.slow
def test_kill_9_from_outside(colour_recipe: Any, tmp_path: Path, whole: Path) -> None:
    """The command itself, killed three times at seeded moments and continued."""
    content = colour_recipe(**EVERY_STEP)
    path = write_recipe(tmp_path / "recipe.yaml", content)
    command = [sys.executable, "-m", "guilomo.cli", "run", str(path), "--resume", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    draw, output = random.Random(0), Path(content["output"])
    for started in (
        "search/search.safetensors",
        "methods/guilomo/seed-0/checkpoints",
        "methods/guilomo/seed-0/adapter",
    ):
        process = subprocess.Popen(command, env=environment)
        while not (output / started).exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1 * draw.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    assert read_json(output / "results.json")["status"] == "complete"
    found = load_file(next(output.rglob("adapter_model.safetensors")))
    for name, tensor in load_file(next(whole.rglob("adapter_model.safetensors"))).items():
        assert tensor.equal(found[name])
