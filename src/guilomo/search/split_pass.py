"""One pass over a batch whose first rows are training rows and whose other rows are held-out rows.

The layers of the mixture split their own gradients (`guilomo.layers.split`). Other trained modules, such as a
classification head, are called here on the two parts of the batch apart, with constant parameters for the held-out
part, so that every held-out gradient ends in a selection vector and no other place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from guilomo.errors import GuilomoError
from guilomo.search.distributed import total_statistics, world
from guilomo.tuner import LoraMoeLayer, RoutingContext, SelectionMasks


@contextmanager
def masked(context: RoutingContext, masks: dict[str, SelectionMasks]) -> Iterator[None]:
    """Applies selection masks in every adapted layer; router losses within are those of the global batch."""
    before = context.masks, context.total
    context.masks = masks
    context.total = total_statistics if world() > 1 else None
    try:
        yield
    finally:
        context.masks, context.total = before


def constant(masks: dict[str, SelectionMasks]) -> dict[str, SelectionMasks]:
    """The same masks, cut off from what they came from."""
    # Copies, because compiled models are made anew for tensors that lie elsewhere in their storage.
    return {
        name: SelectionMasks(*(None if m is None else m.detach().clone() for m in vars(both).values()))
        for name, both in masks.items()
    }


@contextmanager
def leaves_of(masks: dict[str, SelectionMasks]) -> Iterator[dict[str, SelectionMasks]]:
    """Yields the masks cut off from what they came from; their gradients are passed on there afterwards.

    Reentrant gradient checkpointing runs a backward for every block, and no two of those may share a graph.
    """
    cut = constant(masks)
    pairs = [pair for name in masks for pair in zip(vars(masks[name]).values(), vars(cut[name]).values(), strict=True)]
    learned = [(mask, leaf.requires_grad_()) for mask, leaf in pairs if mask is not None and mask.requires_grad]
    yield cut
    reached = [(mask, leaf.grad) for mask, leaf in learned if leaf.grad is not None]
    torch.autograd.backward([mask for mask, _ in reached], [gradient for _, gradient in reached])


@contextmanager
def without_router_losses(context: RoutingContext) -> Iterator[None]:
    """Leaves out the routers' auxiliary losses."""
    before = context.attach_losses
    context.attach_losses = False
    try:
        yield
    finally:
        context.attach_losses = before


@contextmanager
def collected_router_losses(context: RoutingContext) -> Iterator[list[Tensor]]:
    """Yields a list that the routers' auxiliary losses are added to, in place of feeding the backward by themselves."""
    context.collected = []
    try:
        yield context.collected
    finally:
        context.collected = None


@contextmanager
def split_batch(model: nn.Module, context: RoutingContext, training_rows: int) -> Iterator[None]:
    """Within, the first `training_rows` rows feed weights and the others feed selection masks."""
    with ExitStack() as stack:
        for name, module in other_trained_modules(model):
            stack.enter_context(_split_calls(name, module, context))
        context.training_rows = training_rows
        try:
            yield
        finally:
            context.training_rows = None


def other_trained_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules outside the mixtures that own trained parameters."""
    mixtures = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, LoraMoeLayer))
    return [
        (name, module)
        for name, module in model.named_modules()
        if not name.startswith(mixtures)
        and any(p.requires_grad for p in module.parameters(recurse=False))
        and not isinstance(module, LoraMoeLayer)
    ]


@contextmanager
def _split_calls(name: str, module: nn.Module, context: RoutingContext) -> Iterator[None]:
    original = module.forward
    placed = module.__dict__.get("forward")  # hooks of other libraries may have put one on the instance
    module.forward = _split_forward(name, module, original, context)
    try:
        yield
    finally:
        del module.forward  # back to the class's method
        if placed is not None:
            module.forward = placed


def _split_forward(
    name: str, module: nn.Module, original: Callable[..., Any], context: RoutingContext
) -> Callable[..., Any]:
    inside = False

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return original(x, *args, **kwargs)
        if args or kwargs:
            raise GuilomoError(
                f"Module {name!r} is trained beside the mixture and takes more than one input, so its gradients cannot "
                "be split by rows. Use hypergradient='unrolled', or leave it out of modules_to_save."
            )
        n = context.split_at(x)
        constants = {k: p.detach() for k, p in module.named_parameters(recurse=False)}
        inside = True
        try:
            held_out = torch.func.functional_call(module, constants, (x[n:],))
        finally:
            inside = False
        return torch.cat([original(x[:n]), held_out])

    return forward
