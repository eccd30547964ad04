"""Stopped and continued searches end with the same bits; bad checkpoints are refused; good ones survive crashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from search_tools import assert_same_bits, bits_of, mixture_search, small_config

from guilomo import GuilomoError
from guilomo.files import load_state, save_state
from guilomo.files import state as state_module
from guilomo.search import Search, SearchConfig, SearchResult

STEPS = 10
VARIANTS: dict[str, dict[str, Any]] = {
    "first_order": {},
    "unrolled": {"hypergradient": "unrolled"},
    "sgd": {"optimizer": "sgd", "outer_every": 3, "masks": "soft"},
    "prefix": {"relaxation": "prefix", "hypergradient": "authors_code"},
    "may_go": {"min_experts": 0, "record_every": 3},
    "hard": {"masks": "hard"},
}


def _config(variant: str, **options: Any) -> SearchConfig:
    return small_config(steps=STEPS, final_temperature=0.3, checkpoint_every=3, **VARIANTS[variant], **options)


def _search(config: SearchConfig, folder: Path | None = None, **options: Any) -> Search:
    return mixture_search(config, folder=folder, **{"lora_dropout": 0.2, **options})


def _after(steps: int) -> Callable[[], bool]:
    """Asks to stop when asked for the `steps`-th time."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) == steps


def _same_result(a: SearchResult, b: SearchResult) -> None:
    assert a.allocation == b.allocation
    assert a.preference == b.preference
    assert a.trajectory.to_dict(["x", "y", "z"]) == b.trajectory.to_dict(["x", "y", "z"])
    assert (a.steps, a.outer_steps, a.stopped_early) == (b.steps, b.outer_steps, b.stopped_early)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_at_any_step_to_the_same_bits(variant: str, tmp_path: Path) -> None:
    whole = _search(_config(variant))
    wanted = whole.run()
    bits = bits_of(whole)
    for stop in range(1, STEPS):
        folder = tmp_path / str(stop)
        first = _search(_config(variant), folder)
        first.run(should_stop=_after(stop))
        assert first.step == stop
        second = _search(_config(variant), folder)
        with torch.no_grad():  # nothing may depend on how the second process starts
            for w in second.weights:
                w.normal_()
        torch.randn(stop)
        found = second.run()
        assert_same_bits(bits, bits_of(second))
        _same_result(found, wanted)


def test_stopping_returns_what_there_is_and_goes_on_in_the_same_object(tmp_path: Path) -> None:
    whole = _search(_config("first_order"))
    wanted = whole.run()
    bits = bits_of(whole)
    for folder in (tmp_path, None):
        search = _search(_config("first_order"), folder)
        part = search.run(should_stop=_after(4))
        assert (part.steps, part.outer_steps, part.stopped_early) == (4, 1, False)
        assert part.allocation.parameters() <= search.budget
        _same_result(search.run(), wanted)
        assert_same_bits(bits, bits_of(search))


def test_killed_between_checkpoints(tmp_path: Path) -> None:
    """The steps after the last checkpoint are done again, to the same bits."""
    whole = _search(_config("unrolled"))
    wanted = whole.run()
    bits = bits_of(whole)

    def kill(step: int, steps: int, text: str) -> None:
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _search(_config("unrolled"), tmp_path).run(kill)
    assert load_state(tmp_path / "search.safetensors")[1]["step"] == 6
    again = _search(_config("unrolled"), tmp_path)
    _same_result(again.run(), wanted)
    assert_same_bits(bits, bits_of(again))


def test_a_finished_search_is_read_back_whole(tmp_path: Path) -> None:
    """The temperature is that of the last step, not one step further."""
    first = _search(_config("first_order"), tmp_path)
    wanted = first.run()
    again = _search(_config("first_order"), tmp_path)
    steps = []
    _same_result(again.run(lambda step, *_: steps.append(step)), wanted)
    assert steps == []
    assert again.vectors.temperature == first.vectors.temperature == pytest.approx(0.3)
    resumed = _search(_config("first_order"), tmp_path)
    resumed.resume()
    assert resumed.allocation() == wanted.allocation
    assert_same_bits(bits_of(first), bits_of(resumed))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.001 then, 0.5 now"),
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"hypergradient": "unrolled"}, "hypergradient: 'first_order' then, 'unrolled' now"),
    ],
)
def test_other_settings_are_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    _search(_config("first_order"), tmp_path).run(should_stop=_after(2))
    with pytest.raises(GuilomoError, match="other settings") as error:
        _search(_config("first_order", **options), tmp_path).run()
    assert named in str(error.value)
    assert str(tmp_path / "search.safetensors") in str(error.value)
    assert "another output folder" in str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lora_dropout": 0.3}, "lora_dropout: 0.2 then, 0.3 now"),
        ({"lora_alpha": 4.0}, "lora_alpha: 16.0 then, 4.0 now"),
        ({"modules_to_save": ["head"]}, "trained_parameters: "),
        ({"share": 0.5}, "budget: "),
        ({"target_modules": r"layers\.[01]"}, "modules: "),
    ],
)
def test_other_models_and_budgets_are_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    _search(_config("first_order"), tmp_path).run(should_stop=_after(2))
    with pytest.raises(GuilomoError, match="other settings") as error:
        _search(_config("first_order"), tmp_path, **change).run()
    assert named in str(error.value)


def test_other_data_is_refused(tmp_path: Path) -> None:
    _search(_config("first_order"), tmp_path).run(should_stop=_after(2))
    other = _search(_config("first_order"), tmp_path)
    other.data.train = other.data.train[:-1]
    with pytest.raises(GuilomoError, match="train_rows: 16 then, 15 now"):
        other.run()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "foreign", "folder"])
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    search = _search(_config("first_order"), tmp_path)
    search.run(should_stop=_after(2))
    path = tmp_path / "search.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "foreign":
        save_file({"x": torch.zeros(2)}, path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "garbage": b"\x07" * 500, "empty": b""}[damage])
    with pytest.raises(GuilomoError, match="not a usable checkpoint") as error:
        _search(_config("first_order"), tmp_path).run()
    assert str(path) in str(error.value)
    assert "Delete it" in str(error.value)


def test_an_interrupted_write_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "state.safetensors"
    save_state(path, {"a": torch.arange(3)}, {"step": 1})

    def half_written(tensors: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_file", half_written)
        with pytest.raises(GuilomoError, match="no space"):
            save_state(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, facts = load_state(path)
    assert torch.equal(tensors["a"], torch.arange(3))
    assert facts == {"step": 1}
    save_state(path, {"a": torch.zeros(3)}, {"step": 3})
    assert load_state(path)[1] == {"step": 3}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
