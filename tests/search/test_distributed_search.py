"""Two processes search as one does: the same gradients, the same allocation, the same bits after a stop."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import joint_searches
import pytest
import torch
from joint_searches import CASES, RESUMED, followed, joint_search
from search_tools import assert_same_bits, relative_error

from guilomo import GuilomoError

PROCESSES = 2


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[int | None], Path]:
    """Exit codes of two fresh processes, and what they wrote; both take seconds to start, so all tests share them."""
    folder, context = tmp_path_factory.mktemp("joint"), multiprocessing.get_context("spawn")
    entry = joint_searches.all_cases
    jobs = [context.Process(target=entry, args=(i, PROCESSES, folder), daemon=True) for i in range(PROCESSES)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=300)
    return [job.exitcode for job in jobs], folder


@pytest.fixture(scope="module")
def joint(ended: tuple[list[int | None], Path]) -> list[dict[str, Any]]:
    """What each of the two processes found in all cases."""
    return [torch.load(ended[1] / f"{i}.pt") for i in range(PROCESSES)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_agree_to_the_bit(case: str, joint: list[dict[str, Any]]) -> None:
    a, b = (found["cases"][case] for found in joint)
    assert a["allocation"] == b["allocation"]
    assert a["trajectory"] == b["trajectory"]
    assert a["result"] == b["result"]
    different = {k for k in a["bits"] if not torch.equal(a["bits"][k], b["bits"][k])}
    assert different == {"rng"}  # dropout is drawn anew in each


def test_most_cases_draw_expert_counts() -> None:
    drawn = {case for case in CASES if joint_search(case).vectors.pairs}
    assert set(CASES) - drawn == {"soft masks", "prefix, authors"}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_follow_one(case: str, joint: list[dict[str, Any]]) -> None:
    """Every gradient of every step: of weights and of selection vectors, router losses included."""
    alone, together = followed(joint_search(case)), joint[0]["cases"][case]
    assert together["allocation"] == alone["allocation"]
    assert together["result"][:3] == alone["result"][:3]
    assert len(together["gradients"]) == len(alone["gradients"])
    for found, wanted in zip(together["gradients"], alone["gradients"], strict=True):
        assert relative_error(found, wanted) < 1e-10
    experts = [pair[0] for pair in alone["gradients"] if len(pair) == 2]
    assert any((g != 0).any() for g in experts)
    for key in ("train_loss", "held_out_loss"):
        pairs = zip(together["trajectory"][key], alone["trajectory"][key], strict=True)
        assert all(a == b if b is None else a == pytest.approx(b, rel=1e-10) for a, b in pairs)


def test_resumed_after_every_step_to_the_same_bits(joint: list[dict[str, Any]]) -> None:
    for found in joint:
        for stop in range(1, RESUMED["steps"]):
            assert_same_bits(found["resumed"][0], found["resumed"][stop])


def test_process_0_decides_when_to_stop(joint: list[dict[str, Any]]) -> None:
    assert [found["asked"] for found in joint] == [[3, RESUMED["steps"]]] * PROCESSES


def test_all_start_from_the_weights_of_process_0(joint: list[dict[str, Any]]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(*(found["unlike"] for found in joint), strict=True))


def test_gradients_are_summed_where_any_process_has_them(joint: list[dict[str, Any]]) -> None:
    for found in joint:
        both, one, none = found["summed"]
        assert both.tolist() == [3.0]
        assert one.tolist() == [0.5, 7.0]
        assert none is None


def test_what_several_processes_cannot_do_is_refused(joint: list[dict[str, Any]]) -> None:
    for found in joint:
        assert "runs in one process, not in 2" in found["refused"]["exact"]
        for name in ("batch_size", "held_out_batch_size"):
            assert f"search.{name} = 1 leaves a process without rows" in found["refused"][name]
    assert "folder" not in joint[0]["refused"]
    assert "Process 1 stands at step 0, process 0 at step 4" in joint[1]["refused"]["folder"]


def test_processes_that_have_not_joined_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GuilomoError, match=r"2 processes were started .* each would search alone"):
        joint_search("log")


def test_a_process_that_dies_does_not_leave_the_other_waiting(ended: tuple[list[int | None], Path]) -> None:
    codes, folder = ended
    assert codes == [0, 3]
    assert torch.load(folder / "left 0.pt")["seconds"] < 60
