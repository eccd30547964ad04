"""What must not get worse, counted and therefore the same on every machine; clocks decide nothing here."""

from __future__ import annotations

import pytest
import torch

from benchmarks.speed.cells.cell import Setting
from benchmarks.speed.cells.decode import decode_of
from benchmarks.speed.cells.layer import counted, inputs
from benchmarks.speed.kernels import count
from benchmarks.speed.models import LLAMA_LINEARS, Adaptation, llama, random_tokens
from benchmarks.speed.shapes import LayerShape, LayerWeights
from benchmarks.speed.variants import build_layer

RANKS = (3, 8, 1, 5, 16, 2, 19, 10)
TOKENS, WIDTH = 300, 768
CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "most"), [("bf16", 8), ("fp32", 7)])
def test_decoding(dtype: str, most: int) -> None:
    """Operations beyond the frozen model's, per adapted linear and token; none waits for data."""
    torch.manual_seed(0)
    base = llama(128, 2, dtype, heads=2)
    adaptation = Adaptation(LLAMA_LINEARS, RANKS, 2, dtype)
    linears = len(adaptation.names(base))
    found = {}
    for variant in ("frozen", "ours", "peft"):
        adapted = adaptation.apply(variant, base)
        adapted.model.eval()
        work = decode_of(adapted, random_tokens(1, 8, 0, CPU), random_tokens(1, 1, 1, CPU))
        work()  # the first call makes what later ones look up
        found[variant] = count(work)
    extra = found["ours"].kernels.total() - found["frozen"].kernels.total()
    assert extra <= most * linears
    assert found["ours"].data_dependent == found["frozen"].data_dependent
    assert found["peft"].kernels.total() - found["frozen"].kernels.total() == 4 * linears  # what we count is counted


@pytest.mark.parametrize("path", ["fused", "joined"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_layer(dtype: str, path: str) -> None:
    setting = Setting(CPU, rounds=1, seed=0, clock="cpu")
    shape = LayerShape.square(WIDTH, TOKENS, RANKS, 2, dtype)
    weights = LayerWeights.random(shape, 0, setting.device)
    x, dy = inputs(shape, setting)
    ours, peft = (counted(build_layer(name, shape, weights), x, dy) for name in (f"ours:{path}", "peft"))
    size, experts = {"bf16": 2, "fp32": 4}[dtype], len(RANKS)
    # Plain LoRA keeps (T, R); a mixture also needs its weights (T, E) in float32.
    assert ours["saved_bytes"] <= peft["saved_bytes"] + TOKENS * experts * 4 + TOKENS * experts * size
    assert ours["peak_bytes"] < peft["peak_bytes"]  # nothing as large as y or dx is made
    assert ours["forward_backward"]["data_dependent"] == 0
    assert ours["forward_backward"]["kernels"] <= 40
