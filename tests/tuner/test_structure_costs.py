"""What a forward pass multiplies is what plans say: one A for all experts, one frozen product per token in a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adapter_tools import attach
from guilomo.layers.paths import using

TOKENS = 70


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(13, 11, bias=False), nn.Linear(13, 11, bias=False)
        self.down_proj = nn.Linear(11, 13, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x).sigmoid() * self.up_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def _flops(options: dict[str, Any]) -> tuple[int, int]:
    """Counted in a forward pass beyond the frozen products, and as the plan has it."""
    model = attach(Model(), num_experts=4, r=3, balance_loss=None, **options)
    frozen = 2 * 3 * 13 * 11
    with using("packed"), FlopCounterMode(display=False) as counter:
        model(torch.randn(TOKENS, 13))
    plan = model.peft_config["default"].plan
    return counter.get_total_flops() - TOKENS * frozen, TOKENS * plan.flops_per_token()


@pytest.mark.parametrize("shared_a", [False, True])
def test_of_a_mixture(shared_a: bool) -> None:
    """Plans leave out what spreads 4 weights, and on this path z of a shared A, over 12 rank rows."""
    counted, planned = _flops({"shared_a": shared_a})
    assert counted == planned + TOKENS * 3 * 2 * 12 * (4 + 3 * shared_a)


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"shared_a": True}])
def test_of_a_feed_forward_block(options: dict[str, Any]) -> None:
    counted, planned = _flops({"feed_forward_experts": True, **options})
    assert counted == planned
