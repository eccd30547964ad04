"""The operations of a split batch: the forward is the plain one, each gradient comes from its own rows only."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.layers.split import linear_of_training_rows, scale_by_held_out_rows, shift_by_held_out_rows

ROWS = 5


def _x() -> Tensor:
    return torch.randn(ROWS, 3, 4, dtype=torch.float64)


@pytest.mark.parametrize("n", [0, 2, ROWS])
def test_linear(n: int) -> None:
    x, w = _x().requires_grad_(), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(ROWS, 3, 6, dtype=torch.float64)
    y = linear_of_training_rows(x, w, n)
    assert torch.equal(y, F.linear(x, w))
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    (dx_plain,) = torch.autograd.grad(F.linear(x, w), x, dy)
    (dw_plain,) = torch.autograd.grad(F.linear(x[:n], w), w, dy[:n])
    assert torch.allclose(dx, dx_plain, rtol=1e-13)
    assert torch.allclose(dw, dw_plain, rtol=1e-13)


@pytest.mark.parametrize("n", [0, 2, ROWS])
@pytest.mark.parametrize("operation", [scale_by_held_out_rows, shift_by_held_out_rows])
def test_masks(operation: object, n: int) -> None:
    x, mask = _x().requires_grad_(), torch.randn(4, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    scales = operation is scale_by_held_out_rows
    y = operation(x, mask, n)
    assert torch.equal(y, x * mask if scales else x + mask)
    dx, dm = torch.autograd.grad(y, (x, mask), dy)
    assert torch.equal(dx, dy * mask if scales else dy)
    held_out = (dy * x if scales else dy)[n:].reshape(-1, 4).sum(0)
    assert torch.allclose(dm, held_out, rtol=1e-13)
    assert (n == ROWS) == bool((dm == 0).all())


def test_linear_without_needed_gradients() -> None:
    x, w = _x(), torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    linear_of_training_rows(x, w, 2).sum().backward()
    assert w.grad is not None
    x.requires_grad_()
    linear_of_training_rows(x, w.detach(), 2).sum().backward()
    assert x.grad is not None
