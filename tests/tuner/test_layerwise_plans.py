"""Plans whose layers differ in experts and ranks (HILO, MoLA, AlphaLoRA, NormalE), on a model of four layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from adapter_tools import attach, logits, reload, train_a_step
from guilomo import Allocation, GuilomoError
from guilomo.allocation import alphalora, hilo, mola, normal
from guilomo.layers.naive import naive_delta, naive_topk_weights
from guilomo.tuner import LoraMoeLayer, adaptable_modules
from tiny_models import inputs_for, llama

INPUTS = inputs_for("llama")
COUNTS, RANKS = (2, 4, 6, 8), (2, 4, 5, 7)
"""By layer: HILO's groups, and its ramp from 2 to 7, where halves round up."""
PLANS: dict[str, Callable[[dict[str, tuple[int, int]]], Allocation]] = {
    "hilo": lambda shapes: hilo(shapes, min_rank=2, max_rank=7),
    "mola": lambda shapes: mola(shapes, "diamond", rank=3),
    "alphalora": lambda shapes: alphalora(shapes, [2.0, 4.0, 3.0, 5.0], total_experts=12, rank=3),
    "normal": lambda shapes: normal(shapes, rank=3),
}


def _base() -> nn.Module:
    torch.manual_seed(1)
    return llama(num_hidden_layers=4)


def _shapes() -> dict[str, tuple[int, int]]:
    return {name: shape for name, shape in adaptable_modules(_base()).items() if ".layers." in name}


def test_hilo_trains_what_its_formula_counts() -> None:
    """``sum over layers and projections of E_l r_l (d_in + d_out) + E_l d_in``, to the digit."""
    model = attach(_base(), allocation=hilo(_shapes(), min_rank=2, max_rank=7))
    wanted = 0
    for name, (d_in, d_out) in _shapes().items():
        layer = int(name.split(".")[2])
        wanted += COUNTS[layer] * RANKS[layer] * (d_in + d_out) + COUNTS[layer] * d_in
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted


def test_layers_of_unequal_rank_are_packed_each_for_itself() -> None:
    model = attach(_base(), allocation=hilo(_shapes(), min_rank=2, max_rank=7)).double()
    for layer in (m for m in model.modules() if isinstance(m, LoraMoeLayer)):
        depth = int(layer.name.split(".")[2])
        experts, rank = COUNTS[depth], RANKS[depth]
        a, b = layer.molora_A["default"], layer.molora_B["default"]
        assert (len(a), b.shape[1]) == (experts * rank, experts * rank)
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        weights = naive_topk_weights(x @ layer.molora_router["default"].weight.T, 2)
        scales = [16 / rank] * experts
        wanted = layer.base_layer(x) + naive_delta(x, a, b, weights, [rank] * experts, scales)
        assert torch.allclose(layer(x), wanted, rtol=1e-11, atol=1e-12)


def test_a_constant_hilo_is_mola_on_a_model_too() -> None:
    found = []
    for plan in (hilo(_shapes(), experts=5, min_rank=3, max_rank=3), mola(_shapes(), "rectangle", rank=3)):
        torch.manual_seed(4)
        model = attach(_base(), allocation=plan)
        train_a_step(model, INPUTS)
        found.append(logits(model, INPUTS))
    assert torch.equal(*found)


@pytest.mark.parametrize("strategy", PLANS)
def test_saved_is_loaded_and_another_schedule_is_refused(strategy: str, tmp_path: Path) -> None:
    plan = PLANS[strategy](_shapes())
    assert len({module.ranks for module in plan.modules.values()}) > 1
    model = attach(_base(), allocation=plan)
    train_a_step(model, INPUTS)
    model.save_pretrained(tmp_path)
    again = reload(_base(), tmp_path)
    assert again.peft_config["default"].plan == plan
    assert torch.equal(logits(again, INPUTS), logits(model, INPUTS))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    modules = config["allocation"]["modules"]
    depths = {name: int(name.split(".")[2]) for name in modules}
    # The same counts and ranks, one layer lower.
    config["allocation"]["modules"] = {
        name: modules[name.replace(f".{depth}.", f".{(depth + 1) % 4}.", 1)] for name, depth in depths.items()
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(GuilomoError, match=r"do not belong to the allocation"):
        reload(_base(), tmp_path)
