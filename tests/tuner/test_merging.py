"""Mixtures whose gates are constant merge into the frozen weight, Conv1D included, and come out again."""

from __future__ import annotations

import pytest
import torch

from adapter_tools import attach, logits
from guilomo import GuilomoError
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for

OPTIONS = [
    {"router": "fixed"},
    {"router": "fixed", "router_options": {"weights": [0.5, 0.2, 0.3]}, "rank_pattern": {".*": [1, 4, 2]}},
    {"num_experts": 1, "top_k": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["equal weights", "given weights", "one expert"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_merged_equals_unmerged(name: str, options: dict[str, object]) -> None:
    inputs = inputs_for(name)
    model = attach(build(name).double(), **options).double()
    wanted, base = logits(model, inputs), logits(build(name).double(), inputs)
    assert (wanted - base).abs().max() > 1e-4
    layer = next(m for m in model.modules() if isinstance(m, LoraMoeLayer))
    frozen = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model, inputs), wanted, rtol=1e-10, atol=1e-12)
    model.merge_adapter()  # a second time changes nothing
    assert torch.allclose(logits(model, inputs), wanted, rtol=1e-10, atol=1e-12)
    with model.disable_adapter():
        assert torch.allclose(logits(model, inputs), base, rtol=1e-10, atol=1e-12)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.allclose(layer.get_base_layer().weight, frozen, rtol=0, atol=1e-14)
    assert torch.allclose(logits(model, inputs), wanted, rtol=1e-10, atol=1e-12)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, LoraMoeLayer) for m in merged.modules())
    assert set(merged.state_dict()) == set(build(name).state_dict())
    assert torch.allclose(logits(merged, inputs), wanted, rtol=1e-10, atol=1e-12)


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = attach(build("llama"), router="fixed")
    layer = next(m for m in model.modules() if isinstance(m, LoraMoeLayer))
    frozen = layer.get_base_layer().weight.detach().clone()
    layer.molora_B["default"].data[0, 0] = float("nan")
    with pytest.raises(GuilomoError, match=r"not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, frozen)
