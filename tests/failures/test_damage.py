"""Truncated, altered, pickled and incomplete files are refused by name, and nothing is ever unpickled."""

from __future__ import annotations

import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from guilomo.cli import main
from guilomo.errors import GuilomoError
from guilomo.files import load_state, save_state
from guilomo.run import Run
from guilomo.training import Interrupted
from tiny_runs import StopAfter, recipe, run_of, write_recipe

WEIGHTS = "adapter_model.safetensors"


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def trap(path: Path) -> bytes:
    """A pickle that would make the file; that it does is checked here."""
    content = pickle.dumps(Trap(path))
    pickle.loads(content)
    path.unlink()
    return content


def flip(path: Path, place: float) -> None:
    """Flips one bit, `place` of the way into the file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def not_finite(path: Path) -> None:
    tensors = load_file(path)
    name = next(n for n in tensors if ".0." in n and tensors[n].is_floating_point())
    tensors[name].view(-1)[1] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    path.with_name(f"{path.name}.sha256").unlink()


@pytest.fixture(scope="module")
def finished(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with the adapters of a mixture and of PEFT's LoRA."""
    task = {"kind": "classification", "source": str(colours), "name": "colours"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guilomo.run.pipeline.write_report", lambda results, path: None)
        run = run_of(recipe(bert_folder, task, tmp_path_factory.mktemp("run"), methods=["uniform", "lora"]))
        run.all()
    return run


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut, "damaged"),
    "flipped": (lambda path: flip(path, 0.8), "does not match adapter_model.safetensors.sha256"),
    "not finite": (not_finite, "holds values that are not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("method", ["uniform", "lora"])
def test_a_damaged_adapter_is_not_evaluated(
    method: str, damage: str, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(finished, method, tmp_path)
    change, says = DAMAGES[damage]
    change(folder / WEIGHTS)
    path = write_recipe(tmp_path / "recipe.yaml", finished.config.model_dump(mode="json"))
    assert main(["evaluate", str(path), "--adapter", str(folder), "--quiet"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert says in printed
    assert WEIGHTS in printed
    assert "Copy the whole adapter folder again" in printed


@pytest.mark.parametrize("damage", DAMAGES)
def test_peft_itself_refuses_a_damaged_mixture(damage: str, finished: Run, tmp_path: Path) -> None:
    folder = copied(finished, "uniform", tmp_path)
    change, says = DAMAGES[damage]
    change(folder / WEIGHTS)
    with pytest.raises(GuilomoError, match=says):
        PeftModel.from_pretrained(finished.fresh_model(0), str(folder))


def test_a_damaged_adapter_is_not_inspected(finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(finished, "uniform", tmp_path)
    assert main(["inspect", str(folder)]) == 0
    flip(folder / WEIGHTS, 0.9)
    assert main(["inspect", str(folder)]) == 2
    assert "does not match" in capsys.readouterr().err


def test_other_tools_can_check_the_checksum(finished: Run, tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("needs the command sha256sum")
    folder = copied(finished, "lora", tmp_path)
    check = ["sha256sum", "--check", f"{WEIGHTS}.sha256"]
    assert subprocess.run(check, cwd=folder, check=False, capture_output=True).returncode == 0
    flip(folder / WEIGHTS, 0.9)
    assert subprocess.run(check, cwd=folder, check=False, capture_output=True).returncode == 1


def test_weights_that_are_not_finite_never_reach_a_mixture(finished: Run, tmp_path: Path) -> None:
    folder = copied(finished, "uniform", tmp_path)
    model = PeftModel.from_pretrained(finished.fresh_model(0), str(folder))
    weights = load_file(folder / WEIGHTS)
    name = next(n for n in weights if "molora_A" in n)
    weights[name][0, 0] = float("inf")
    with pytest.raises(GuilomoError, match=r"molora_A.* holds values that are not finite"):
        set_peft_model_state_dict(model, weights)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_a_pickled_adapter_is_never_unpickled(
    name: str, finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, sprung = copied(finished, "uniform", tmp_path), tmp_path / "sprung"
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.sha256").unlink()
    (folder / name).write_bytes(trap(sprung))
    path = write_recipe(tmp_path / "recipe.yaml", finished.config.model_dump(mode="json"))
    assert main(["evaluate", str(path), "--adapter", str(folder), "--quiet"]) == 2
    assert name in capsys.readouterr().err
    with pytest.raises(Exception, match="pickle" if name.endswith("bin") else "header"):
        PeftModel.from_pretrained(finished.fresh_model(0), str(folder))
    assert not sprung.exists()


def test_a_pickled_base_model_is_never_unpickled(colour_recipe: Any, bert_folder: Path, tmp_path: Path) -> None:
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(bert_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(trap(sprung))
    with pytest.raises(GuilomoError, match=r"model\.path = .* cannot be loaded.*model\.safetensors"):
        run_of(colour_recipe(model={"path": str(folder)})).fresh_model(0)
    assert not sprung.exists()


STAGES = {"search": "search/search.safetensors", "lora seed 0": "methods/lora/seed-0/checkpoints/training.safetensors"}


@pytest.fixture
def stopped(colour_recipe: Any) -> Callable[[str], tuple[Callable[[], Any], Path]]:
    """`stopped(stage)` -> how to continue a run that stopped there, and its checkpoint."""

    def stop(stage: str) -> tuple[Callable[[], Any], Path]:
        content = colour_recipe(methods=["guilomo" if stage == "search" else "lora"])
        with pytest.raises(Interrupted):
            run_of(content, StopAfter(stage, 3)).all()
        return run_of(content).all, Path(content["output"]) / STAGES[stage]

    return stop


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_checkpoint_is_not_continued(stage: str, stopped: Any) -> None:
    resume, path = stopped(stage)
    whole = path.read_bytes()
    for place in (0.02, 0.3, 0.6, 0.99):
        flip(path, place)
        with pytest.raises(GuilomoError, match=rf"{path.name} is not a usable checkpoint .*Delete it"):
            resume()
        path.write_bytes(whole)
    cut(path)
    with pytest.raises(GuilomoError, match="not a usable checkpoint"):
        resume()
    path.write_bytes(whole)
    resume()


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_that_lacks_something_is_not_continued(stage: str, stopped: Any) -> None:
    resume, path = stopped(stage)
    tensors, facts = load_state(path)
    for lacking in ("weights", "random.torch", "inner.held" if stage == "search" else "optimizer.held"):
        save_state(path, {k: v for k, v in tensors.items() if k != lacking}, facts)
        with pytest.raises(GuilomoError, match=f"it lacks '{lacking}'"):
            resume()
    save_state(path, tensors, {k: v for k, v in facts.items() if k != "identity"})
    with pytest.raises(GuilomoError, match="it lacks 'identity'"):
        resume()


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_that_is_not_finite_is_not_continued(stage: str, stopped: Any) -> None:
    resume, path = stopped(stage)
    tensors, facts = load_state(path)
    save_state(path, {**tensors, "weights": torch.full_like(tensors["weights"], torch.inf)}, facts)
    with pytest.raises(GuilomoError, match="'weights' holds values that are not finite"):
        resume()


@pytest.mark.parametrize("stage", STAGES)
def test_a_pickled_checkpoint_is_never_unpickled(stage: str, stopped: Any, tmp_path: Path) -> None:
    resume, path = stopped(stage)
    sprung = tmp_path / "sprung"
    whole = path.read_bytes()
    path.write_bytes(trap(sprung))
    with pytest.raises(GuilomoError, match="not a usable checkpoint"):
        resume()
    # What Trainer's own checkpoints hold is not looked at.
    path.write_bytes(whole)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"):
        (path.parent / "checkpoint-3").mkdir(exist_ok=True)
        (path.parent / "checkpoint-3" / name).write_bytes(trap(sprung))
        (path.parent / name).write_bytes(trap(sprung))
    resume()
    assert not sprung.exists()


def test_a_training_under_other_settings_is_not_continued(stopped: Any, colour_recipe: Any) -> None:
    _, path = stopped("lora seed 0")
    other = run_of(colour_recipe(methods=["lora"], train={"learning_rate": 0.5, "max_grad_norm": 2.0}))
    says = r"training\.safetensors was made with other settings \(learning_rate: 0\.001 then, 0\.5 now, max_grad_norm"
    with pytest.raises(GuilomoError, match=says):
        other.all()
    assert path.exists()


def copied(run: Run, method: str, folder: Path) -> Path:
    return Path(shutil.copytree(run.config.folder / "methods" / method / "seed-0" / "adapter", folder / "adapter"))
