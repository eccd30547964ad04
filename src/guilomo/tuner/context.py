"""What the layers of one model share during a forward pass.

One plain object per base model, held by every adapted layer and by two hooks on the base model (not on the PEFT
wrapper, which untyped models and transformers' own ``add_adapter`` bypass). It carries no parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guilomo.errors import invalid
from guilomo.layers.attach import LossScale
from guilomo.layers.balance import RouterStatistics
from guilomo.layers.feed_forward import Slots
from guilomo.tuner.loss_scale import measure_loss_scale, token_share
from guilomo.tuner.shared_input import SharedInputs

TASKS = "router_task_ids"
"""The model's keyword, and the column of token rows, that says each row's task; ``task_ids`` is PEFT's own."""


@dataclass
class SelectionMasks:
    """The search's masks for one module: ``log_expert (E,)`` is added to the logits, ``rank (R,)`` multiplies rows.

    Or, with a mask for every row of the batch, ``(B, E)`` and ``(B, R)``.
    """

    log_expert: Tensor | None
    rank: Tensor | None


@dataclass
class RoutingContext:
    """State of the forward pass now running.

    Attributes:
        real: ``(B, S)`` which tokens are real (not padding), or None for all.
        batch_size: rows of the batch, when the model's inputs say so.
        task: ``(B,)`` int64 task of each row, or None; task_given: those of `tasks_given`, for passes that name none.
        in_forward: False during a recomputation by gradient checkpointing, so that nothing is counted twice.
        record: whether to sum router statistics for health reports.
        statistics: summed statistics per module, when recorded.
        scale: what auxiliary losses are worth in the backward pass.
        pending: statistics of the modules of a group that ran so far, for losses over whole layers.
        masks: the search's masks by module; empty outside a search.
        training_rows: how many leading rows of a split batch are training rows; None for an ordinary batch.
        attach_losses: False while a loss is wanted without the routers' auxiliary losses.
        collected: where auxiliary losses go instead of into the backward, for second derivatives; None: attached.
        slots: the chosen experts of the feed-forward blocks that have begun and not ended, by adapter and block.
        total: adds up router statistics over processes before a router loss is made of them; None: each its own.
        shared: the layers that read the same input.
    """

    real: Tensor | None = None
    batch_size: int | None = None
    task: Tensor | None = None
    task_given: Tensor | None = None
    in_forward: bool = False
    record: bool = False
    statistics: dict[str, RouterStatistics] = field(default_factory=dict)
    scale: LossScale = field(default_factory=LossScale)
    pending: dict[str, list[RouterStatistics]] = field(default_factory=dict)
    masks: dict[str, SelectionMasks] = field(default_factory=dict)
    training_rows: int | None = None
    attach_losses: bool = True
    collected: list[Tensor] | None = None
    slots: dict[str, Slots] = field(default_factory=dict)
    total: Callable[[RouterStatistics], RouterStatistics] | None = None
    shared: SharedInputs = field(default_factory=SharedInputs)

    def split_at(self, x: Tensor) -> int | None:
        """Rows of the leading dimension of `x` that are training rows; None for an ordinary batch.

        Raises:
            RuntimeError: the leading dimension is not a whole number of batch rows.
        """
        if self.training_rows is None:
            return None
        if not self.batch_size or x.shape[0] % self.batch_size:
            raise RuntimeError(
                f"A split batch of {self.batch_size} rows met a layer input of shape {tuple(x.shape)}: the batch must "
                "come first in every adapted layer. Use hypergradient='unrolled' for this model."
            )
        return self.training_rows * (x.shape[0] // self.batch_size)

    def masks_for(self, module: str, x: Tensor) -> SelectionMasks | None:
        """The masks of a module, those for rows of the batch shaped to fit ``x (N, ..., I)``; None outside a search."""
        masks = self.masks.get(module)
        return None if masks is None else SelectionMasks(*(self._for_rows_of(x, m) for m in vars(masks).values()))

    def tasks_for(self, x: Tensor) -> Tensor | None:
        """``(N,)`` tasks of the rows of ``x (N, ..., I)``; None where nobody gave them.

        Raises:
            GuilomoError: as `batch_tasks`.
        """
        tasks = self.batch_tasks(x)
        return None if tasks is None else tasks.repeat_interleave(x.shape[0] // len(tasks))

    def batch_tasks(self, x: Tensor) -> Tensor | None:
        """``(B,)`` tasks of the rows of the batch that ``x (N, ..., I)`` came from; None where nobody gave them.

        Raises:
            GuilomoError: the leading dimension is not a whole number of batch rows, or tasks are no whole numbers.
        """
        if self.task is None:
            return None
        if self.task.dim() != 1 or self.task.is_floating_point():
            got = f"{self.task.dtype} of shape {tuple(self.task.shape)}"
            raise invalid(TASKS, got, "one whole number per row of the batch, (B,) int64")
        if not len(self.task) or x.shape[0] % len(self.task):
            raise invalid(TASKS, f"for {len(self.task)} rows", f"one per row; a layer's input has {x.shape[0]} rows")
        return self.task.to(x.device, torch.int64)

    def _for_rows_of(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None or mask.dim() == 1:
            return mask
        if x.shape[0] % len(mask):
            raise RuntimeError(
                f"Masks for a batch of {len(mask)} rows met a layer input of shape {tuple(x.shape)}: the batch must "
                "come first in every adapted layer. Use masks='soft' and hypergradient='unrolled' for this model."
            )
        repeated = mask.repeat_interleave(x.shape[0] // len(mask), dim=0)
        return repeated.view(x.shape[0], *[1] * (x.dim() - 2), -1)

    def counted(self, x: Tensor) -> Tensor | None:
        """Which tokens of ``x (..., I)`` count in router statistics, shaped ``x.shape[:-1]``; None for all."""
        shape = x.shape[:-1]
        counted = None
        # A pooler sees one token per row, (B, I): none of them is padding, and the mask's columns are not its own.
        pooled = self.real is not None and tuple(shape) == (self.real.shape[0],)
        if self.real is not None and len(shape) and not pooled and self.real.numel() >= shape.numel():
            rows = shape.numel() // max(self.real.shape[0], 1)
            # With a key-value cache the mask covers past tokens too; the layer sees only the newest ones.
            newest = self.real[:, self.real.shape[1] - rows :]
            if newest.numel() == shape.numel():
                counted = newest.reshape(shape)
        split = self.split_at(x)
        if split is not None:
            training = torch.arange(shape[0], device=x.device) < split
            training = training.view(-1, *[1] * (len(shape) - 1)).expand(shape)
            counted = training if counted is None else counted.bool() & training
        return counted

    def observe(self, module: str, statistics: RouterStatistics) -> None:
        """Adds to the recorded statistics of a module, once per forward pass."""
        if self.record and self.in_forward:
            seen = self.statistics.get(module)
            detached = statistics.detach().without_rows()
            self.statistics[module] = detached if seen is None else seen + detached


def begin_forward(
    context: RoutingContext, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Pre-forward hook of the base model: finds the token mask and the batch size among the inputs, and takes out the
    rows' tasks, which the model itself does not know."""
    asked = kwargs
    if TASKS in kwargs:
        kwargs = {name: value for name, value in kwargs.items() if name != TASKS}
    context.task = asked.get(TASKS, context.task_given)
    inputs = _named_inputs(module, args, kwargs)
    mask = inputs.get("attention_mask")
    context.real = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    first = next((t for t in inputs.values() if isinstance(t, Tensor) and t.dim()), None)
    context.batch_size = first.shape[0] if first is not None else None
    context.pending.clear()
    context.shared.forget()
    context.slots.clear()
    if first is not None and torch.is_grad_enabled():
        context.scale.reset(first.device)
    context.in_forward = True
    return None if kwargs is asked else (args, kwargs)


def end_forward(context: RoutingContext, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Post-forward hook of the base model: lets the auxiliary losses follow what the trainer does to the loss."""
    context.in_forward = False
    context.shared.forget()
    if not torch.is_grad_enabled():
        return output
    return measure_loss_scale(output, context.scale, token_share(module, _named_inputs(module, args, kwargs)))


def _named_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def context_of(model: nn.Module) -> RoutingContext:
    """The context of a base model; the first call creates it and hooks it in.

    The hooks are partials of module-level functions, so that models still deepcopy and pickle.
    """
    context: RoutingContext | None = model.__dict__.get("_guilomo_context")
    if context is None:
        context = RoutingContext()
        handles = (
            model.register_forward_pre_hook(partial(begin_forward, context), with_kwargs=True),
            model.register_forward_hook(partial(end_forward, context), with_kwargs=True),
        )
        model.__dict__["_guilomo_context"] = context
        model.__dict__["_guilomo_hooks"] = handles
    return context


@contextmanager
def tasks_given(model: nn.Module, tasks: Tensor | None) -> Iterator[None]:
    """Inside, every pass that names no tasks itself has these ``(B,)``: for ``generate``, which refuses new keywords.

    Nothing is done where there are no tasks, or no mixture that could read them.

    Args:
        model: a base model, or whatever is wrapped around it.
        tasks: int64, of the rows of the batch; None for none. Beams of a row share its task.
    """
    contexts = _contexts_in(model) if tasks is not None else []
    before = [context.task_given for context in contexts]
    for context in contexts:
        context.task_given = tasks
    try:
        yield
    finally:
        for context, given in zip(contexts, before, strict=True):
            context.task_given = given


def knows_tasks(model: nn.Module) -> bool:
    """Whether a model, wrapped or not, takes the tasks of rows: whether it has a mixture."""
    return bool(_contexts_in(model))


def _contexts_in(model: nn.Module) -> list[RoutingContext]:
    return [m.__dict__["_guilomo_context"] for m in model.modules() if "_guilomo_context" in m.__dict__]


def remove_context(model: nn.Module) -> None:
    """Takes the hooks of `context_of` off the model again."""
    for handle in model.__dict__.pop("_guilomo_hooks", ()):
        handle.remove()
    model.__dict__.pop("_guilomo_context", None)
