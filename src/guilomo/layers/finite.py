"""Finds where a value that is not finite arises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

NOWHERE = "in no module when the batch was run again"
"""The answer where dropout or a norm of huge but finite gradients was at fault."""


def first_non_finite(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """Repeats a pass and says where its first value that is not finite arises (ours). Gradients are lost.

    Args:
        model: its modules are watched in the order in which they finish.
        run: computes the loss ``()`` of the batch at fault; called once, and differentiated.

    Returns:
        A phrase such as "first in the output of module 'layers.3.mlp'": the first output, else the loss, else the
        first gradient of an output in the backward pass, else the gradient of a parameter.
    """
    found: list[str] = []
    model.zero_grad()
    hooks = [
        module.register_forward_hook(partial(_look_at_output, found, name.removeprefix("base_model.model.") or "model"))
        for name, module in model.named_modules()
    ]
    try:
        loss = run()
        if not found and not loss.isfinite().all():
            found.append("in the loss, from finite outputs of every module")
        if not found:
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in model.named_parameters():
        if not found and parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"in the backward pass, in the gradient of parameter {name!r}")
    return f"first {found[0]}" if found else NOWHERE


def remedy(group: str, learning_rate: float, max_grad_norm: float | None, model: nn.Module) -> str:
    """What to lower, with the present values.

    Args:
        group: of the fields `learning_rate` and `max_grad_norm`, "search" or "train".
    """
    limit = f"{group}.max_grad_norm (now {max_grad_norm})" if max_grad_norm else f"set {group}.max_grad_norm (now off)"
    advice = f"Lower {group}.learning_rate (now {learning_rate}) or {limit}"
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{advice}, or use model.dtype = float32 (now {dtype})." if dtype == "float16" else f"{advice}."


def _look_at_output(found: list[str], name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    for tensor in _tensors(output):
        if not found and not tensor.isfinite().all():
            found.append(_cause(name, module, args))
        if tensor.requires_grad:
            tensor.register_hook(partial(_look_at_gradient, found, name))


def _cause(name: str, module: nn.Module, args: tuple[Any, ...]) -> str:
    for key, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            when = "before this step" if parameter.requires_grad else "as it was loaded"
            return f"in module {name!r}, in its weight {key!r} {when}"
    if any(not tensor.isfinite().all() for tensor in _tensors(args)):
        return f"in the input of module {name!r}"
    return f"in the output of module {name!r}"


def _look_at_gradient(found: list[str], name: str, gradient: Tensor) -> None:
    if not found and not gradient.isfinite().all():
        found.append(f"in the backward pass, in the gradient of the output of module {name!r}")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of real numbers in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
