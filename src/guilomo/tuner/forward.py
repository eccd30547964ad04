"""How a layer computes: which path, and what each of them needs of the layer. The paths are in `guilomo.layers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from guilomo.layers.attach import attach_loss
from guilomo.layers.balance import EVERYTHING, router_statistics
from guilomo.layers.frozen_linear import Frozen
from guilomo.layers.fused import Member, expand, expand_frozen, shrink
from guilomo.layers.packed import packed_delta
from guilomo.layers.paths import JOINED, forced, sorting_pays
from guilomo.layers.products import MANY_TOKENS, computation_dtype
from guilomo.layers.routed import expand_routed, kernels_serve, route_in_kernel
from guilomo.layers.routing import Router, Routing
from guilomo.layers.sequential import sequential_delta
from guilomo.layers.shared import stacked_identities
from guilomo.layers.sorted import gather_shrink, scatter_expand, sort_tokens
from guilomo.layers.split import linear_of_training_rows, shift_by_held_out_rows
from guilomo.tuner.context import SelectionMasks
from guilomo.tuner.mixture import Mixture
from guilomo.tuner.shared_input import Part, Reading

Addition = Callable[[Tensor], Tensor]
"""Adds a mixture to the output of the frozen layer."""


def adapted_output(mixtures: Sequence[Mixture], base: nn.Module, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The output of the frozen layer ``(N, ..., O)`` with all mixtures, router losses attached."""
    path: str | None = None
    reading: Reading | None = None
    if len(mixtures) == 1 and not (args or kwargs or torch.compiler.is_compiling()):
        reading = mixtures[0].layer.context.shared.take(mixtures[0].layer, x)
        path = path_of(mixtures[0], x) if reading is None else reading.path
        if path in JOINED:
            return _joined(mixtures[0], x, reading or _read(mixtures[0], x, path))
    additions = []
    for mixture in mixtures:
        if mixture.plan.rank:
            x, add = _begin(mixture, x, path or path_of(mixture, x), reading)
            additions.append(add)
    y: Tensor = base(x, *args, **kwargs)
    dtype = y.dtype
    y = _with_sequential(y, mixtures)
    for add in additions:
        y = add(y)
    return y.to(dtype)


def path_of(mixture: Mixture, x: Tensor) -> str:
    """How the mixture is to be computed: as `guilomo.layers.paths.using` asks, if it can be; else what pays."""
    asked = forced()
    if asked == "packed" or torch.compiler.is_compiling():
        return "packed"
    tokens = x.shape[:-1].numel()
    if asked in ("kernels", None) and _can_route_in_kernel(mixture, x) and _can_join(mixture, x):
        return "kernels"
    if asked in ("sorted", None) and (asked or _sorting_pays(mixture, x, tokens)) and _can_sort(mixture):
        return "sorted"
    if asked in (*JOINED, None) and (asked or tokens >= MANY_TOKENS) and _can_join(mixture, x):
        return "joined"
    return "fused"


def _can_route_in_kernel(mixture: Mixture, x: Tensor) -> bool:
    router = mixture.top_k
    if router is None or not kernels_serve(x, mixture.plan.rank, router.experts, router.top_k):
        return False
    # The kernel gives routing weights no gradient of their own.
    reads_weights = mixture.loss.active and mixture.loss.reads & {"weight", "entropy", "rows"}
    return not (mixture.plan.structured or mixture.is_searched or mixture.drops_something or reads_weights)


def _can_sort(mixture: Mixture) -> bool:
    odd = mixture.plan.structured or mixture.is_searched or mixture.drops_something
    return mixture.top_k is not None and not odd and is_unseen(mixture.layer.base_layer)


def _sorting_pays(mixture: Mixture, x: Tensor, tokens: int) -> bool:
    router = mixture.top_k
    if router is None or tokens < MANY_TOKENS:
        return False
    dtype = computation_dtype(x, mixture.a)
    return sorting_pays(tokens, mixture.plan.rank, router.top_k, router.experts, dtype, x.device)


def _can_join(mixture: Mixture, x: Tensor) -> bool:
    """Whether the frozen layer is nothing but ``x W^T + bias`` with an ordinary frozen weight of x's dtype."""
    base = mixture.layer.base_layer
    if type(base) is not nn.Linear or "forward" in base.__dict__ or base._forward_pre_hooks or not is_unseen(base):
        return False
    if mixture.plan.sequential_rank or not mixture.plan.rank:
        return False
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if type(weight) is not nn.Parameter or weight.dtype != x.dtype or weight.dim() != 2:
        return False
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not trained and computation_dtype(x, mixture.a) == x.dtype


def is_unseen(base: nn.Module) -> bool:
    """Whether nobody else sees what the frozen layer makes: its output and the gradient of its input.

    Other modules than linear ones may pass on what others hold.
    """
    watched = base._forward_hooks or base._backward_hooks or base._backward_pre_hooks
    return isinstance(base, (nn.Linear, Conv1D)) and not watched


def _owns(base: nn.Module, y: Tensor) -> bool:
    """Whether the frozen layer's output may be changed in place."""
    return is_unseen(base) and y.is_contiguous() and not y._is_view()


def _with_sequential(y: Tensor, mixtures: Sequence[Mixture]) -> Tensor:
    """The frozen output, and what the sequential branches make of it."""
    deltas = []
    for mixture in mixtures:
        if mixture.plan.sequential_rank:
            c, d, scale = mixture.layer.sequential(mixture.adapter)
            deltas.append(sequential_delta(y, c, d, scale, mixture.chance("input"), mixture.chance("rank")))
    for delta in deltas:
        y = y + delta
    return y


def _begin(mixture: Mixture, x: Tensor, path: str, reading: Reading | None) -> tuple[Tensor, Addition]:
    """The x that the frozen layer is to read, and what adds the mixture to its output."""
    if path == "packed":
        return _packed(mixture, x)
    return _sorted(mixture, x) if path == "sorted" else _fused(mixture, x, reading or _read(mixture, x, "fused"))


def _packed(mixture: Mixture, x: Tensor) -> tuple[Tensor, Addition]:
    a, layer, layout, router = mixture.down(), mixture.layer, mixture.layout, mixture.router
    masks, split = layer.context.masks_for(layer.name, x), layer.context.split_at(x)
    wide = layer._cast_input_dtype(x, a.dtype)
    routing = None
    if router is not None:
        scored = F.linear(wide, a) if router.reads_ranks else wide
        routing = _route(mixture, router, _logits(router, scored, split), wide, masks, split)
    weights = None if routing is None else routing.weights
    rank_mask = None if masks is None else masks.rank

    def add(y: Tensor) -> Tensor:
        read, rows = F.dropout(wide, mixture.chance("input")), a
        if mixture.plan.shared_a:
            read, rows = linear_of_training_rows(read, a, split), stacked_identities(layout.experts, a)
        drop = mixture.chance("rank")
        y = y + packed_delta(read, rows, mixture.b, weights, layout.spread, rank_mask, split, drop)
        return _with_losses(mixture, y, x, routing)

    return x, add


def _sorted(mixture: Mixture, x: Tensor) -> tuple[Tensor, Addition]:
    a, router, layout = mixture.a, mixture.top_k, mixture.layout
    assert router is not None
    read, [(_, logits)] = shrink(x, [Member(a.detach()[:0], router.score_rows)], in_place=True)
    assert logits is not None
    routing = _route(mixture, router, logits, x, None, None)
    order = sort_tokens(routing.chosen, layout.all_ranks)
    read, h = gather_shrink(read, a.to(computation_dtype(x, a)), order)

    def add(y: Tensor) -> Tensor:
        owns = _owns(mixture.layer.base_layer, y)
        y = scatter_expand(y, h, routing.weights, order, mixture.b, layout.scales, owns)
        return _with_losses(mixture, y, x, routing)

    return read, add


def _fused(mixture: Mixture, x: Tensor, reading: Reading) -> tuple[Tensor, Addition]:
    h, routing, mask = _gating(mixture, x, reading)

    def add(y: Tensor) -> Tensor:
        owns, split = _owns(mixture.layer.base_layer, y), mixture.layer.context.split_at(x)
        y = expand(y, h, routing, mixture.layout.spread, mask, mixture.b, split, owns)
        return _with_losses(mixture, y, x, routing)

    return reading.read, add


def _joined(mixture: Mixture, x: Tensor, reading: Reading) -> Tensor:
    frozen, made, (h, logits) = reading.frozen, reading.made, reading.shrunk
    assert frozen is not None
    routing: Routing | None
    if made is not None and logits is not None:
        routing = replace(made.routing, logits=logits)
        y = expand_routed(x, frozen, reading.shrunk, made, mixture.layout.spread, mixture.b)
    else:
        split = mixture.layer.context.split_at(x)
        h, routing, mask = _gating(mixture, x, reading)
        y = expand_frozen(x, frozen, h, routing, mixture.layout.spread, mask, mixture.b, split)
    return _with_losses(mixture, y, x, routing)


def _read(mixture: Mixture, x: Tensor, path: str) -> Reading:
    """The narrow products of x, made now for all the layers that are likely to be called with it."""
    context, drop = mixture.layer.context, mixture.chance("input")
    others = [] if drop else [m for m in context.shared.companions(mixture.layer) if _goes_along(m, x, mixture, path)]
    every = [mixture, *others]
    parts = [_part(m, x, path) for m in every]
    in_place = all(is_unseen(m.layer.base_layer) for m in every)
    made = [part.made.shrunk for part in parts if part.made is not None]
    read, shrunk = shrink(x, [p.member for p in parts], context.split_at(x), drop, in_place, made or None)
    readings = [Reading(path, read, s, p.member.frozen, p.made) for s, p in zip(shrunk, parts, strict=True)]
    for other, reading in zip(others, readings[1:], strict=True):
        context.shared.put_aside(other.layer, x, reading)
    return readings[0]


def _part(mixture: Mixture, x: Tensor, path: str) -> Part:
    base, router = mixture.layer.base_layer, mixture.top_k
    frozen = Frozen(base.weight, base.bias) if path in JOINED and isinstance(base, nn.Linear) else None
    member = Member(mixture.down(), mixture.score_rows, frozen)
    if path != "kernels" or router is None:
        return Part(member, None)
    return Part(member, route_in_kernel(x, member, mixture.layout.spread, router.top_k))


def _goes_along(mixture: Mixture, x: Tensor, leader: Mixture, path: str) -> bool:
    """Whether a layer, if called with x, would take `path` with weights that are at hand and fit the leader's.

    Sharded or offloaded weights are at hand only while their own layer runs.
    """
    if mixture.layer._forward_pre_hooks or mixture.chance("input"):
        return False
    own, rows = mixture.a, mixture.score_rows
    fits = all(t.dtype == leader.a.dtype and t.device == x.device for t in (own, rows) if t is not None)
    present = type(own) is nn.Parameter and own.shape[1:] == x.shape[-1:]
    return fits and present and path_of(mixture, x) == path


def _gating(mixture: Mixture, x: Tensor, reading: Reading) -> tuple[Tensor, Routing | None, Tensor | None]:
    """h ``(T, R)`` with its dropout, the routing, and the mask of the rank rows, as `expand` takes them."""
    layer, router, (h, logits) = mixture.layer, mixture.router, reading.shrunk
    masks, split = layer.context.masks_for(layer.name, x), layer.context.split_at(x)
    if router is not None and logits is None:
        logits = _logits(router, h.reshape(*x.shape[:-1], -1) if router.reads_ranks else x, split)
    routing = None
    if router is not None and logits is not None:
        routing = _route(mixture, router, logits, x, masks, split)
    if mixture.plan.shared_a:
        h = h.repeat(1, mixture.layout.experts)
    if (drop := mixture.chance("rank")) > 0:
        h = F.dropout(h, drop)
    mask = None if masks is None else masks.rank
    if mask is not None and mask.dim() > 1:
        mask = mask.reshape(len(mask), -1)
    return h, routing, mask


def _route(
    mixture: Mixture, router: Router, logits: Tensor, x: Tensor, masks: SelectionMasks | None, split: int | None
) -> Routing:
    """The routing under a search's masks, of which the router is told in training unless it is a recomputation."""
    tokens = mixture.tokens(x)
    if masks is not None and masks.log_expert is not None:
        logits = shift_by_held_out_rows(logits, masks.log_expert.to(logits.dtype), split)
    routing = router.route(logits, tokens)
    if mixture.layer.training and mixture.layer.context.in_forward:
        router.observe(routing, tokens)
    return routing


def _logits(router: Router, x: Tensor, n: int | None) -> Tensor:
    """The router's logits; in a split batch, only the first `n` rows of `x` feed its parameters."""
    if n is None:
        return router.logits(x)
    frozen = {name: p.detach() for name, p in router.named_parameters()}
    held_out: Routing = torch.func.functional_call(router, frozen, (x[n:],))
    return torch.cat([router.logits(x[:n]), held_out.logits])


def _with_losses(mixture: Mixture, y: Tensor, x: Tensor, routing: Routing | None) -> Tensor:
    return y if routing is None else with_router_losses(mixture, y, x, routing)


def with_router_losses(mixture: Mixture, y: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """`y`, whose backward brings the gradient of the router's losses too; statistics are recorded where asked for."""
    layer, loss = mixture.layer, mixture.loss
    context = layer.context
    needed = loss.active and layer.training and context.attach_losses and torch.is_grad_enabled()
    if not needed and not context.record:
        return y
    wanted = (EVERYTHING if context.record else frozenset()) | (loss.reads if needed else frozenset())
    tasks = context.batch_tasks(x) if "rows" in wanted else None
    statistics = router_statistics(routing, context.counted(x), wanted, tasks)
    if mixture.adapter == layer.active_adapters[0]:  # one record per module: adapters may differ in expert counts
        context.observe(layer.name, statistics)
    value = loss(context, statistics) if needed else None
    if value is None:
        return y
    if context.collected is not None:
        context.collected.append(value)
        return y
    return attach_loss(y, value, context.scale)
