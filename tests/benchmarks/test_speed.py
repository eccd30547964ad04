"""The speed benchmark: its baselines compute the mixture, its counters count, its clocks compare fairly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count as counting
from pathlib import Path
from typing import Any

import pytest
import torch

from absolute_paths import absolute_paths
from benchmarks.speed import __main__ as runner
from benchmarks.speed import page as speed_page
from benchmarks.speed.agreement import compare
from benchmarks.speed.cells import Cell, Setting, cells_for, chosen
from benchmarks.speed.clocks import Work
from benchmarks.speed.disturbance import Disturbance, Watch
from benchmarks.speed.equality import errors
from benchmarks.speed.kernels import count
from benchmarks.speed.memory import saved_bytes
from benchmarks.speed.models import LLAMA_LINEARS, Adaptation, llama, random_tokens
from benchmarks.speed.page import page
from benchmarks.speed.shapes import LayerShape, LayerWeights
from benchmarks.speed.spread import dropped, middle, ratio
from benchmarks.speed.targets import TARGETS, by_name
from benchmarks.speed.timing import interleave
from benchmarks.speed.variants import MIXTURES, VARIANTS, build_layer, forward_backward_of, unsupported
from guilomo.errors import GuilomoError
from guilomo.evaluation.memory import peak_bytes

CPU = torch.device("cpu")
SETTING = Setting(CPU, rounds=2, seed=0, clock="wall")


@pytest.mark.parametrize("variant", MIXTURES)
@pytest.mark.parametrize(
    ("ranks", "top_k"),
    [((4, 4, 4, 4), 2), ((3, 8, 1, 5, 2), 2), ((4, 2, 7), 3), ((2, 9), 1)],
    ids=["uniform", "mixed", "all", "top-1"],
)
def test_every_mixture_computes_what_the_naive_loop_does(variant: str, ranks: tuple[int, ...], top_k: int) -> None:
    shape = LayerShape(19, 23, 37, ranks, top_k, "fp64")
    limit = 1e-12
    if unsupported(variant, shape):
        shape, limit = LayerShape(20, 24, 37, ranks, top_k, "fp32"), 1e-5
    found = errors(variant, shape, seed=3, device=CPU)
    assert set(found) == {"y", "dx", "da", "db", "drouter"}
    assert max(found.values()) <= limit


def test_experts_without_tokens_have_no_gradient() -> None:
    """One token leaves most experts out."""
    for variant in MIXTURES:
        shape = LayerShape(16, 16, 1, (2,) * 4, 2, "fp32")
        assert max(errors(variant, shape, seed=1, device=CPU).values()) <= 1e-5


def test_grouped_products_say_what_they_cannot_do() -> None:
    assert "float64" in str(unsupported("grouped_gemm", LayerShape(16, 16, 4, (2, 2), 1, "fp64")))
    assert "multiples of 8" in str(unsupported("grouped_gemm", LayerShape(12, 16, 4, (2, 2), 1, "bf16")))
    assert unsupported("sparse_loop", LayerShape(12, 16, 4, (2, 2), 1, "fp64")) is None


def test_an_unknown_variant_is_refused() -> None:
    shape = LayerShape(8, 8, 2, (2, 2), 1, "fp32")
    with pytest.raises(GuilomoError, match="sparse_loop"):
        build_layer("sparse_lop", shape, LayerWeights.random(shape, 0, CPU))


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_have_the_dtype_of_the_linear(variant: str) -> None:
    shape = LayerShape(16, 16, 4, (2, 2), 1, "bf16")
    layer = build_layer(variant, shape, LayerWeights.random(shape, 0, CPU))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_models_start_as_the_frozen_model(variant: str) -> None:
    """B is zero at the start; the frozen weights are shared, not copied."""
    torch.manual_seed(0)
    base = llama(32, 1, "fp32", heads=2, vocabulary=16)
    tokens = random_tokens(2, 5, 0, CPU, vocabulary=16)
    adapted = Adaptation(LLAMA_LINEARS, (2, 2), 1, "fp32").apply(variant, base)
    torch.testing.assert_close(adapted(input_ids=tokens).logits, base(input_ids=tokens).logits)
    frozen = {p.data_ptr() for p in base.parameters()}
    assert frozen == {p.data_ptr() for p in adapted.model.parameters() if not p.requires_grad}
    assert bool(adapted.trained) == (variant != "frozen")


def test_kernels_are_counted_and_views_are_not() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 5)
    found = count(lambda: (x @ w).relu())
    assert found.to_dict() == {"kernels": 2, "data_dependent": 0}
    assert count(lambda: x.t().reshape(2, 6)[0].detach()).to_dict() == {"kernels": 1, "data_dependent": 0}  # the copy


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x: x.nonzero(), 1),
        (lambda x: x.sum().item(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x.long().abs().bincount(), 1),
        (lambda x: torch.where(x > 0)[0], 1),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: torch.where(x > 0, x, 0), 0),
    ],
)
def test_operations_that_depend_on_data_are_counted(work: Callable[[Any], object], expected: int) -> None:
    x = torch.arange(6.0)
    assert count(lambda: work(x)).data_dependent.total() == expected


def test_the_loop_over_experts_looks_at_the_data_and_ours_does_not() -> None:
    shape = LayerShape(16, 16, 8, (2,) * 4, 2, "fp32")
    x = torch.randn(8, 16, requires_grad=True)
    found = {}
    for variant in ("ours", "sparse_loop"):
        layer = build_layer(variant, shape, LayerWeights.random(shape, 0, CPU))
        found[variant] = count(forward_backward_of(layer, x, torch.randn(8, 16))).to_dict()
    assert found["ours"]["data_dependent"] == 0
    assert found["sparse_loop"]["data_dependent"] >= shape.experts


def test_saved_bytes_are_those_of_distinct_storages_without_what_is_given() -> None:
    x, w = torch.randn(6, 4), torch.randn(4, 5, requires_grad=True)
    # Given tensors are left out; tanh keeps its result (6, 5), and so does its square, which is the same storage.
    assert saved_bytes(lambda: (x @ w).tanh().square(), [x, w]) == 6 * 5 * 4
    assert saved_bytes(lambda: (x @ w).tanh().square(), [w]) == (6 * 5 + 6 * 4) * 4


def test_the_peak_is_the_most_alive_at_once() -> None:
    def work() -> None:
        a = torch.ones(100)  # 400
        b = a * 2  # 800
        del a
        c = b + 1  # 800
        c.mul_(3)  # in place
        del b
        c[10:] + 1  # 760

    assert peak_bytes(work) == 800


def test_the_median_has_an_interval_of_order_statistics() -> None:
    assert middle([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    # Binomial tails: with 9 values 2 of 512 × (1 + 9) is 3.9 %, one further value would be 18 %.
    assert [dropped(n) for n in (1, 5, 6, 9, 15, 25)] == [0, 0, 0, 1, 3, 7]


class Steps:
    """A clock by which each work takes what a table says, in a machine that slows down from call to call."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.slow = counting(1)
        self.calls: list[str] = []

    def __call__(self, work: Work, times: int) -> float:
        name = str(work())
        self.calls.append(name)
        return self.seconds[name]


def watches(clean: Iterator[bool]) -> Callable[[], Any]:
    """Watches that see other work or not, as the iterator says."""

    class Given:
        def stop(self) -> Disturbance:
            return Disturbance(1.0, 0.0 if next(clean) else 0.5, None, 0)

    return Given


def works(*names: str) -> dict[str, Work]:
    return {name: (lambda name=name: name) for name in names}


def test_disturbed_rounds_are_thrown_away() -> None:
    timing = interleave(
        works("a", "b"), 3, Steps({"a": 2.0, "b": 1.0}), watches(iter([True, False, False, True, True]))
    )
    assert (timing.discarded, timing.noisy) == (2, False)
    assert timing.to_dict("b")["ratios"]["a"] == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_too_many_disturbed_rounds_are_called_noisy() -> None:
    timing = interleave(works("a"), 3, Steps({"a": 1.0}), watches(iter([False] * 6)))
    assert (timing.discarded, timing.noisy, timing.disturbance) == (3, True, 0.5)
    assert len(timing.samples["a"]) == 3


def test_the_order_rotates_and_samples_are_long_enough() -> None:
    clock = Steps({"a": 1e-3, "b": 1.0})
    timing = interleave(works("a", "b"), 2, clock, watches(iter([True] * 2)), sample_seconds=4.5e-3)
    assert timing.repeats == {"a": 5, "b": 1}
    assert clock.calls == ["a", "a", "b", "b", "a", "b", "b", "a"]  # twice each to calibrate


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that slows down fourfold does not change them."""
    assert ratio({"samples": {"a": [2.0, 8.0, 4.0], "b": [1.0, 4.0, 2.0]}}, "a", "b")["median"] == 2.0


def test_what_counts_as_undisturbed() -> None:
    assert Disturbance(1.0, 0.005, 0.03, 5).clean
    assert not Disturbance(1.0, 0.02, 0.0, 0).clean
    assert not Disturbance(1.0, 0.0, 0.2, 0).clean
    assert Disturbance(1.0, None, None, 0).clean
    assert not Disturbance(1.0, None, None, 1).clean
    assert Watch().stop().seconds >= 0


def timing_of(**samples: list[float]) -> dict[str, Any]:
    reference = next(iter(samples))
    found: dict[str, Any] = {"samples": samples, "noisy": False, "reference": reference, "rounds": 3, "discarded": 0}
    return {**found, "ratios": {name: ratio(found, name, reference) for name in samples}}


def search_result(name: str, seconds: float) -> dict[str, Any]:
    timing = timing_of(plain=[1.0] * 3, pair=[seconds] * 3)
    return {"name": name, "kind": "search", "options": {"note": ""}, "times": {"step": timing}}


def verdict(number: int, *cells: dict[str, Any]) -> str:
    return next(t for t in TARGETS if t.number == number).verdict(by_name(cells))[0]


def test_verdicts() -> None:
    good = [search_result(f"search/unrolled-{dtype}", 2.9) for dtype in ("fp32", "bf16")]
    assert verdict(9) == "not measured"
    assert verdict(9, good[0]) == "not measured"
    assert verdict(9, *good) == "met"
    assert verdict(9, good[0], search_result("search/unrolled-bf16", 3.1)) == "missed"
    assert verdict(9, good[0], {"name": "search/unrolled-bf16", "error": "no"}) == "not measured"
    assert [t.number for t in TARGETS] == list(range(1, 17))


def test_a_wrong_choice_of_path_is_regretted() -> None:
    def cell(ours: float) -> dict[str, Any]:
        timing = timing_of(**{"ours:joined": [1.0] * 3, "ours:sorted": [0.5] * 3, "ours": [ours] * 3})
        return {"name": f"choice/{ours}", "kind": "choice", "times": {"forward_backward": timing}}

    assert verdict(7, cell(0.5)) == "met"
    assert verdict(7, cell(0.5), cell(0.6)) == "missed"


def test_graph_breaks_and_recompilations_miss_the_target() -> None:
    def cell(kind: str, **graphs: dict[str, Any]) -> dict[str, Any]:
        return {"name": f"compile/{kind}", "kind": "compile", "compiled": graphs}

    search = cell("search", soft={"graphs": [2, 2]})
    assert verdict(14, cell("training", ours={"graphs": [1, 1]}), search) == "met"
    assert verdict(14, cell("training", ours={"graphs": [1, 2]}), search) == "missed"
    assert verdict(14, cell("training", ours={"graphs": [], "error": "break"}), search) == "missed"


def test_two_runs_agree_within_their_intervals() -> None:
    first, same, other = (search_result("search/soft-fp32", seconds) for seconds in (2.0, 2.0, 3.0))
    assert [c.agrees for c in compare([first], [same])] == [True]
    assert [c.agrees for c in compare([first], [other])] == [False]
    assert compare([first], []) == []


def test_the_cells_of_a_run() -> None:
    quick, full = cells_for(quick=True, cuda=False), cells_for(quick=False, cuda=False)
    for cells in (quick, full):
        assert len({cell.name for cell in cells}) == len(cells)
    kinds = {"equality", "layer", "ranks", "step", "update", "decode", "search", "compile", "wrap"}
    assert {cell.kind for cell in quick} == kinds
    assert {cell.kind for cell in full} == kinds | {"choice", "whole"}
    assert len(cells_for(quick=False, cuda=True)) == len(full) + 1
    assert [cell.name for cell in chosen(full, ["wrap", "step/llama-bf16"])] == ["step/llama-bf16", "wrap/llama-7b"]
    with pytest.raises(GuilomoError, match="Did you mean 'wrap'"):
        chosen(full, ["wrapp"])


def test_every_target_finds_its_cells() -> None:
    """A target that reads a name no cell has would never be measured."""
    names = {cell.name for cell in cells_for(quick=False, cuda=True)}
    failed = by_name([{"name": name, "kind": "", "error": "failed"} for name in names])
    for target in TARGETS:
        whys = {reading.why for reading in target.verdict(failed)[1]}
        assert whys == {"failed"} or target.number == 7, target.number


@pytest.fixture
def two_cells(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A run of one good cell and one that fails; returns the names of what was measured."""
    measured: list[str] = []

    def good(setting: Setting) -> dict[str, Any]:
        measured.append("good")
        return {"options": {"note": ""}, "times": {"step": timing_of(plain=[1.0], pair=[2.0])}}

    def bad(setting: Setting) -> dict[str, Any]:
        measured.append("bad")
        raise RuntimeError("out of luck")

    cells = [Cell("search/good", good), Cell("search/bad", bad)]
    monkeypatch.setattr(runner, "cells_for", lambda quick, cuda: cells)
    return measured


def test_a_run_is_one_json_object_and_continues(
    two_cells: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speed.json"
    assert runner.main(["--json", "--output", str(file)]) == 1
    shown = capsys.readouterr()
    assert "cells: 2/2" in shown.err
    found = json.loads(shown.out)
    assert [cell["name"] for cell in found["cells"]] == ["search/good", "search/bad"]
    assert found["cells"][1]["error"] == "RuntimeError: out of luck"
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert runner.main(["--output", str(file), "--resume"]) == 1
    assert two_cells == ["good", "bad", "bad"]
    assert runner.main(["--output", str(file), "--resume", "--seed", "1"]) == 1
    assert two_cells[3:] == ["good", "bad"]
    stored = json.loads(file.read_text())
    written = page({"speed": stored, "speed-again": stored})
    assert "search/bad: RuntimeError: out of luck" in written
    assert "Of 1 ratios that neither run marks as noisy, 1 have their second median within" in written


def test_options_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert runner.main(["--rounds", "0"]) == 2
    assert "--rounds = 0" in capsys.readouterr().err
    assert runner.main(["--quick", "--only", "layr"]) == 2
    assert "Did you mean 'layer'" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text("[]")
    assert runner.main(["--output", str(other), "--resume", "--only", "wrap"]) == 2
    assert "cannot be continued" in capsys.readouterr().err
    assert runner.main(["--list", "--quick"]) == 0
    assert "wrap/llama-7b" in capsys.readouterr().out


def test_the_page_is_what_the_result_files_say() -> None:
    assert speed_page.PAGE.read_text(encoding="utf-8") == speed_page.page(speed_page.stored())


def test_absent_data_are_no_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("GUILOMO_DATA", raising=False)
    assert runner.main(["--only", "whole", "--rounds", "1", "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert cell["absent"]
    assert "GUILOMO_DATA" in cell["error"]
    assert "models/stories260K" in cell["error"]


def test_no_path_of_a_machine_is_in_the_results(tmp_path: Path) -> None:
    found = tmp_path / "here.json"
    assert runner.main(["--only", "wrap", "--output", str(found)]) == 0
    assert json.loads(found.read_text())["command"] == "python -m benchmarks.speed --only wrap --output here.json"
    for path in speed_page.FOLDER.rglob("*.json"):
        assert absolute_paths(path.read_text()) == [], path.name
