"""Top-k of the softmax, not renormalised: alone, and in a mixture on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapter_tools import attach
from guilomo.layers.naive import naive_delta
from guilomo.layers.routers import router_class
from guilomo.layers.routing import Tokens


def _naive(logits: Tensor, top_k: int) -> Tensor:
    rows = []
    for token in logits:
        p = torch.exp(token - token.max()) / torch.exp(token - token.max()).sum()
        kept = sorted(range(len(token)), key=lambda e: (-float(token[e].detach()), e))[:top_k]
        rows.append(torch.stack([p[e] if e in kept else torch.zeros((), dtype=p.dtype) for e in range(len(token))]))
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("tokens", [7, 90])
def test_definition_and_gradient(tokens: int, top_k: int) -> None:
    router = router_class("topk_of_softmax")(9, 5, top_k)
    logits = torch.randn(tokens, 5, dtype=torch.float64).round(decimals=1).requires_grad_()  # with ties
    routing = router.route(logits, Tokens(logits))
    wanted = _naive(logits, top_k)
    assert torch.allclose(routing.weights, wanted, rtol=1e-12, atol=1e-15)
    assert routing.chosen.sum(-1).eq(top_k).all()
    up = torch.randn_like(wanted)
    (mine,), (naive,) = (torch.autograd.grad(w, logits, up) for w in (routing.weights, wanted))
    assert torch.allclose(mine, naive, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(router.route(logits, Tokens(logits)).weights, routing.weights)


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(13, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("tokens", [6, 150])
def test_in_a_mixture(tokens: int) -> None:
    options = {"rank_pattern": {"lin": [3, 1, 5]}, "router": "topk_of_softmax", "balance_loss": None}
    model = attach(OneLinear().double(), target_modules=["lin"], **options).double()
    layer = model.base_model.model.lin
    a, b, w = layer.molora_A["default"], layer.molora_B["default"], layer.molora_router["default"].weight
    x = torch.randn(tokens, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(tokens, 7, dtype=torch.float64)
    y = model(x)
    wanted = layer.base_layer(x) + naive_delta(x, a, b, _naive(x @ w.T, 2), [3, 1, 5], [16 / 3, 16, 16 / 5])
    assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-13)
    leaves = (x, a, b, w)
    for mine, naive in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        assert torch.allclose(mine, naive, rtol=1e-11, atol=1e-12 * float(naive.abs().max()))
