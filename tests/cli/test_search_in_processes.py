"""``torchrun ... search recipe.yaml``: one printed result, one set of files, and the plan of a single process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from guilomo.allocation import Allocation
from guilomo.cli import main
from guilomo.files import load_state
from guilomo.run.files import read_json
from tiny_runs import write_recipe

pytestmark = pytest.mark.slow


def _torchrun(*arguments: str) -> subprocess.Popen[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launch, "-m", "guilomo.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_two_processes_print_and_find_what_one_does(
    text_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder without dropout, whose rows have different numbers of labels."""
    options = {"mixture": {"dropout": 0.0}, "search": {"batch_size": 7, "held_out_batch_size": 3}}
    together = write_recipe(tmp_path / "together.yaml", text_recipe("causal_lm", "together", **options))
    alone = write_recipe(tmp_path / "alone.yaml", text_recipe("causal_lm", "alone", **options))
    job = _torchrun("search", str(together))
    printed, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert printed.count("allocation  ") == printed.count("  loss ") == 1
    assert main(["search", str(alone)]) == 0
    capsys.readouterr()
    plans = [Allocation.load(tmp_path / name / "search" / "allocation.json") for name in ("together", "alone")]
    assert plans[0] == plans[1]
    losses = [
        read_json(tmp_path / name / "search" / "search.json")["trajectory"]["train_loss"]
        for name in ("together", "alone")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    again = _torchrun("search", str(together), "--resume")
    assert again.communicate(timeout=300)[0].count("allocation  ") == 1


def test_a_signal_saves_the_step_it_comes_in(colour_recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", colour_recipe(search={"steps": 100_000, "record_every": 1000}))
    checkpoint = tmp_path / "run" / "search" / "search.safetensors"
    job = _torchrun("search", str(path))
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=120)
    assert checkpoint.exists(), errors
    stopped = re.search(r"The search stopped at step (\d+) of 100000\. Continue with .* --resume", errors)
    assert stopped is not None, errors
    assert load_state(checkpoint)[1]["step"] == int(stopped[1])
    assert not (tmp_path / "run" / "search" / "search.json").exists()
