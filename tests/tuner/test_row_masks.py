"""Masks for every row of a batch: each row is computed by its own part of the mixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapter_tools import attach
from guilomo.layers.naive import naive_delta, naive_topk_weights
from guilomo.search.relaxation import EXPERT_BLOCK
from guilomo.tuner import LoraMoeLayer, SelectionMasks
from guilomo.tuner.forward import _route

pytestmark = pytest.mark.usefixtures("path")

ROWS, TOKENS, INPUTS, OUTPUTS, E, R = 4, 3, 6, 5, 3, 2
EXPERTS = (1, 3, 2, 3)
RANKS = ((1, 2, 1), (2, 2, 2), (2, 1, 2), (1, 1, 1))
"""Of every row: experts that are on, and rank rows of each that are on."""


def _layer(top_k: int = 2) -> LoraMoeLayer:
    net = nn.Sequential(nn.Linear(INPUTS, OUTPUTS)).double()
    model = attach(net, num_experts=E, r=R, top_k=top_k, target_modules=["0"]).double()
    layer = model.get_base_model()[0]
    assert isinstance(layer, LoraMoeLayer)
    with torch.no_grad():
        layer.molora_B["default"].mul_(15)
    return layer


def _masks() -> SelectionMasks:
    on = torch.arange(E) < torch.tensor(EXPERTS)[:, None]
    rank = torch.arange(R) < torch.tensor(RANKS)[..., None]
    return SelectionMasks(torch.where(on, 0.0, EXPERT_BLOCK), rank.flatten(1).double())


def _by_hand(layer: LoraMoeLayer, x: Tensor, row: int, top_k: int) -> Tensor:
    """``(T, O)`` of the tokens ``(T, I)`` of one row, by the mixture that consists of the row's own part."""
    kept, ranks = EXPERTS[row], RANKS[row][: EXPERTS[row]]
    rows = [e * R + j for e, r in enumerate(ranks) for j in range(r)]
    a, b = layer.molora_A["default"][rows], layer.molora_B["default"][:, rows]
    weights = naive_topk_weights(layer.molora_router["default"].logits(x)[:, :kept], min(top_k, kept))
    scale = float(layer.molora_layout["default"].spread.max())
    return layer.base_layer(x) + naive_delta(x, a, b, weights, ranks, [scale] * kept)


@pytest.mark.parametrize("top_k", [2, 3])
def test_every_row_has_its_own_part_of_the_mixture(top_k: int) -> None:
    layer = _layer(top_k)
    layer.context.masks = {layer.name: _masks()}
    x = torch.randn(ROWS, TOKENS, INPUTS, dtype=torch.float64)
    y = layer(x)
    for row in range(ROWS):
        assert torch.allclose(y[row], _by_hand(layer, x[row], row, top_k), rtol=1e-12, atol=1e-12)
    layer.context.masks = {}
    assert (layer(x) - y)[1].abs().max() < 1e-14  # of this row all is on
    assert ((layer(x) - y)[[0, 2, 3]].abs().amax((1, 2)) > 1e-3).all()


def test_blocked_experts_have_no_weight_and_the_others_share_it() -> None:
    layer = _layer()
    layer.context.masks = {layer.name: _masks()}
    x = torch.randn(ROWS, TOKENS, INPUTS, dtype=torch.float64)
    router = layer.molora_router["default"]
    weights = _route(
        layer.mixtures["default"], router, router.logits(x), x, layer.context.masks_for(layer.name, x), None
    ).weights
    for row, kept in enumerate(EXPERTS):
        assert not weights[row, :, kept:].any()
        assert torch.allclose(weights[row].sum(-1), torch.ones(TOKENS, dtype=torch.float64), rtol=1e-12)


def test_a_row_that_is_off_is_the_frozen_layer() -> None:
    layer = _layer()
    masks = _masks()
    masks.rank[2] = 0
    layer.context.masks = {layer.name: masks}
    x = torch.randn(ROWS, TOKENS, INPUTS, dtype=torch.float64)
    off = (layer(x) == layer.base_layer(x)).flatten(1).all(1)
    assert off.tolist() == [False, False, True, False]


def test_the_shape_of_the_input_does_not_matter() -> None:
    """Tokens flattened into the batch, images, and a pooler's one token per row."""
    layer = _layer()
    layer.context.masks = {layer.name: _masks()}
    x = torch.randn(ROWS, TOKENS, INPUTS, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(layer(x.reshape(ROWS * TOKENS, INPUTS)), y.reshape(ROWS * TOKENS, OUTPUTS))
    assert torch.equal(layer(x[:, :, None]), y[:, :, None])
    assert torch.equal(layer(x.reshape(ROWS * TOKENS, 1, INPUTS)), y.reshape(ROWS * TOKENS, 1, OUTPUTS))
    assert torch.allclose(layer(x[:, 0]), y[:, 0], rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_an_input_without_the_batch_in_front_is_refused(rows: int) -> None:
    layer = _layer()
    layer.context.masks = {layer.name: _masks()}
    with pytest.raises(RuntimeError, match=rf"4 rows met a layer input of shape \({rows}, 6\).* Use masks='soft'"):
        layer(torch.zeros(rows, INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    """Masks are 0 and 1, so that they round nothing, and their gradients come back in float32."""
    layer = _layer().to(torch.float32 if autocast else torch.bfloat16)
    masks = _masks()
    rank = masks.rank.float().requires_grad_()
    layer.context.masks = {layer.name: SelectionMasks(masks.log_expert, rank)}
    x = torch.randn(ROWS, TOKENS, INPUTS, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.float().sum().backward()
    assert rank.grad.dtype == torch.float32
    assert y.dtype == torch.bfloat16
    exact = _layer()
    exact.load_state_dict(layer.state_dict())
    exact.context.masks = {layer.name: masks}
    assert torch.allclose(y.double(), exact(x.double()), rtol=0.05, atol=0.05)
