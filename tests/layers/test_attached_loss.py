"""An attached loss changes no output and adds exactly its gradient, times the scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guilomo.layers.attach import LossScale, attach_loss

W = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7


def _losses(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w.T
    return y, y.square().mean() + w.abs().sum()


def _hand_summed(x: Tensor, factor: float) -> Tensor:
    w = W.clone().requires_grad_()
    y, loss = _losses(x, w)
    (y.sin().sum() + factor * loss).backward()
    return w.grad


def _attached(x: Tensor, factor: float, w: Tensor | None = None) -> Tensor:
    w = W.clone().requires_grad_() if w is None else w
    y, loss = _losses(x, w)
    scale = LossScale()
    out = attach_loss(y, loss, scale)
    assert torch.equal(out, y)
    scale.value.fill_(factor)
    out.sin().sum().backward()
    return w.grad


def test_gradient_is_the_hand_summed_one() -> None:
    x = torch.randn(5, 4)
    for factor in (1.0, 0.25, -3.0, 0.0):
        assert torch.equal(_attached(x, factor), _hand_summed(x, factor))
    assert not torch.equal(_hand_summed(x, 1.0), _hand_summed(x, 0.0))


def test_a_second_derivative_is_refused() -> None:
    """It would feed the loss twice."""
    x, w = torch.randn(5, 4), W.clone().requires_grad_()
    y, loss = _losses(x, w)
    (first,) = torch.autograd.grad(attach_loss(y, loss, LossScale()).sin().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_scale_is_read_when_the_backward_runs() -> None:
    """The trainer's factor is known only once the backward pass has started."""
    x, w = torch.randn(5, 4), W.clone().requires_grad_()
    y, loss = _losses(x, w)
    scale = LossScale()
    out = attach_loss(y, loss, scale).sin().sum()
    scale.value.fill_(0.5)
    out.backward()
    assert torch.equal(w.grad, _hand_summed(x, 0.5))


def test_gradient_accumulation_adds_up() -> None:
    first, second = torch.randn(5, 4), torch.randn(3, 4)
    w = W.clone().requires_grad_()
    _attached(first, 0.5, w)
    _attached(second, 0.5, w)
    assert torch.equal(w.grad, _hand_summed(first, 0.5) + _hand_summed(second, 0.5))


def test_output_is_no_detached_copy() -> None:
    """The gradient of the output passes through unchanged."""
    y = torch.randn(3, requires_grad=True)
    (dy,) = torch.autograd.grad((attach_loss(y, y.sum() * 0, LossScale()) * torch.tensor([1.0, 2.0, 3.0])).sum(), y)
    assert dy.tolist() == [1.0, 2.0, 3.0]
