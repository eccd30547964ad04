"""One adapted linear: the frozen layer plus the packed experts of each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from guilomo.allocation.plan import Allocation, ModulePlan, ModuleShape
from guilomo.errors import GuilomoError
from guilomo.layers.attach import attach_loss
from guilomo.layers.balance import EVERYTHING, router_statistics
from guilomo.layers.fused import MANY_TOKENS, Frozen, Member, computation_dtype, expand, expand_frozen, shrink
from guilomo.layers.packed import ExpertLayout, packed_delta
from guilomo.layers.paths import JOINED, forced, sorting_pays
from guilomo.layers.routed import expand_routed, kernels_serve, route_in_kernel
from guilomo.layers.routers import router_class
from guilomo.layers.routers.linear import LinearRouter
from guilomo.layers.routers.topk import TopKRouter
from guilomo.layers.routing import Router, Routing
from guilomo.layers.sequential import sequential_delta
from guilomo.layers.shared import stacked_identities
from guilomo.layers.sorted import gather_shrink, scatter_expand, sort_tokens
from guilomo.layers.split import linear_of_training_rows, shift_by_held_out_rows
from guilomo.tuner.config import LoraMoeConfig
from guilomo.tuner.context import RoutingContext, SelectionMasks
from guilomo.tuner.router_loss import RouterLoss
from guilomo.tuner.shared_input import Part, Reading

Addition = Callable[[Tensor], Tensor]
"""Adds a mixture to the output of the frozen layer."""


class LoraMoeLayer(nn.Module, BaseTunerLayer):
    """``y = W0 x + B (s * gate * A x)`` for every active adapter.

    Parameters, keyed by adapter name: ``molora_A (R, I)``, or ``(r, I)`` where all experts of rank r read one A;
    ``molora_B (O, R)``; ``molora_router`` (absent for a single expert, whose gate is 1). ``molora_layout`` holds the
    ranks, saved with the weights. With a sequential branch (`guilomo.layers.sequential`) also ``molora_C (r_b, O)`` and
    ``molora_D (O, r_b)``.

    The base layer is any module with ``in_features`` and ``out_features`` (`nn.Linear`, transformers' `Conv1D`,
    quantised linears); it is only ever called, never read.
    """

    adapter_layer_names = ("molora_A", "molora_B", "molora_C", "molora_D", "molora_router")
    other_param_names = (
        "molora_layout",
        "molora_dropout",
        "molora_loss",
        "molora_plan",
        "sequential_scale",
        "fixed_gates",
    )

    def __init__(self, base_layer: nn.Module, name: str, shape: ModuleShape, context: RoutingContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = shape
        self.context = context
        context.shared.layers[name] = self
        self.molora_A = nn.ParameterDict()
        self.molora_B = nn.ParameterDict()
        self.molora_C = nn.ParameterDict()
        self.molora_D = nn.ParameterDict()
        self.molora_router = nn.ModuleDict()
        self.molora_layout = nn.ModuleDict()
        self.molora_dropout = nn.ModuleDict()
        self.molora_loss: dict[str, RouterLoss] = {}
        self.molora_plan: dict[str, ModulePlan] = {}
        self.sequential_scale: dict[str, float] = {}
        self.fixed_gates: dict[str, Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._frozen: tuple[Tensor, Tensor | None] | None = None

    def update_layer(self, adapter: str, plan: Allocation, config: LoraMoeConfig, loss: RouterLoss) -> None:
        """Adds or replaces the experts of one adapter, as `plan` says for this module."""
        module = plan[self.name]
        a = nn.Parameter(torch.empty(module.rows_of_a, self.in_features))
        b = nn.Parameter(torch.zeros(self.out_features, module.rank))
        self._start(a, b, config)
        self.molora_A[adapter] = a
        self.molora_B[adapter] = b
        if module.sequential_rank:
            self.molora_C[adapter] = nn.Parameter(torch.empty(module.sequential_rank, self.out_features))
            self.molora_D[adapter] = nn.Parameter(torch.zeros(self.out_features, module.sequential_rank))
            self._start(self.molora_C[adapter], self.molora_D[adapter], config)
        self.sequential_scale[adapter] = plan.sequential_scale(self.name)
        self.molora_layout[adapter] = ExpertLayout(module.ranks or (0,), plan.scales(self.name) or (0.0,))
        dropout = {config.dropout_on: nn.Dropout(config.lora_dropout), "shared_a": nn.Dropout(config.drop_connect)}
        self.molora_dropout[adapter] = nn.ModuleDict(dropout)
        self.molora_loss[adapter] = loss
        self.molora_plan[adapter] = module
        if module.routes:
            options = {"weights": config.router_weights} if config.router == "fixed" else {}
            router = router_class(config.router)(self.in_features, module.experts, module.top_k, **options)
            self.molora_router[adapter] = router
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    @staticmethod
    def _start(down: Tensor, up: Tensor, config: LoraMoeConfig) -> None:
        if len(down):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        if not config.init_lora_weights:
            nn.init.normal_(up, std=0.02)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        adapters = [adapter for adapter in self.active_adapters if adapter in self.molora_A]
        if len(adapters) == 1 and not (args or kwargs) and self._path(x, adapters[0]) in JOINED:
            return self._joined(x, adapters[0])
        additions = []
        for adapter in adapters:
            if len(self.molora_A[adapter]):
                x, add = self._begin(x, adapter)
                additions.append(add)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        y = self._with_sequential(y)
        for add in additions:
            y = add(y)
        return y.to(dtype)

    def _begin(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        """The x that the frozen layer is to read, and what adds the mixture, router loss attached, to its output."""
        path = self._path(x, adapter)
        if path == "packed":
            return self._packed(x, adapter)
        return self._sorted(x, adapter) if path == "sorted" else self._fused(x, adapter)

    def _with_sequential(self, y: Tensor) -> Tensor:
        """`y`, and what the active adapters' sequential branches make of it."""
        deltas = []
        for adapter in self.active_adapters:
            if adapter in self.molora_C:
                c, d = self.molora_C[adapter], self.molora_D[adapter]
                drops = self._drops(adapter, "input"), self._drops(adapter, "rank")
                deltas.append(sequential_delta(y, c, d, self.sequential_scale[adapter], *drops))
        for delta in deltas:
            y = y + delta
        return y

    def _path(self, x: Tensor, adapter: str) -> str:
        """How the mixture is to be computed: as `guilomo.layers.paths.using` asks, if it can be; else what pays."""
        asked = forced()
        if torch.compiler.is_compiling() or asked == "packed":
            return "packed"
        tokens = x.shape[:-1].numel()
        if asked in ("kernels", None) and self._can_route_in_kernel(x, adapter) and self._can_join(x, adapter):
            return "kernels"
        if asked in ("sorted", None) and self._can_sort(adapter, tokens) and (asked or self._sorting_pays(x, adapter)):
            return "sorted"
        if asked in (*JOINED, None) and (asked or tokens >= MANY_TOKENS) and self._can_join(x, adapter):
            return "joined"
        return "fused"

    def _can_sort(self, adapter: str, tokens: int) -> bool:
        router = self._router(adapter)
        searching = self.context.masks.get(self.name) is not None or self.context.training_rows is not None
        dropping = self._drops(adapter, "input") > 0 or self._drops(adapter, "rank") > 0
        odd = self.molora_plan[adapter].shared_a or searching or dropping
        return isinstance(router, LinearRouter) and not (router.dense or odd) and self._unseen()

    def _can_route_in_kernel(self, x: Tensor, adapter: str) -> bool:
        router, context = self._router(adapter), self.context
        if type(router) is not TopKRouter:
            return False
        if not kernels_serve(x, len(self.molora_A[adapter]), router.experts, router.top_k):
            return False
        searching = self.name in context.masks or context.training_rows is not None or context.collected is not None
        dropping = self._drops(adapter, "input") > 0 or self._drops(adapter, "rank") > 0
        # The kernel gives routing weights no gradient of their own.
        return not (
            self.molora_plan[adapter].shared_a
            or searching
            or dropping
            or self.molora_loss[adapter].reads & {"weight", "entropy"}
        )

    def _sorting_pays(self, x: Tensor, adapter: str) -> bool:
        a, router, tokens = self.molora_A[adapter], self._router(adapter), x.shape[:-1].numel()
        assert isinstance(router, LinearRouter)
        return sorting_pays(tokens, len(a), router.top_k, router.experts, computation_dtype(x, a), x.device)

    def _can_join(self, x: Tensor, adapter: str) -> bool:
        """Whether the frozen layer is nothing but ``x W^T + bias`` with an ordinary frozen weight of x's dtype."""
        base = self.base_layer
        if type(base) is not nn.Linear or "forward" in vars(base) or base._forward_pre_hooks or not self._unseen():
            return False
        if adapter in self.molora_C or not len(self.molora_A[adapter]):
            return False
        plain = type(base.weight) is nn.Parameter and base.weight.dim() == 2 and base.weight.dtype == x.dtype
        trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
        return plain and not trained and computation_dtype(x, self.molora_A[adapter]) == x.dtype

    def _sorted(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        a, b, layout = self.molora_A[adapter], self.molora_B[adapter], self._layout(adapter)
        router = self._router(adapter)
        assert router is not None
        read, [(_, logits)] = shrink(x, [Member(a.detach()[:0], router.score_rows)], in_place=True)
        assert logits is not None
        routing = router.route(logits)
        order = sort_tokens(routing.chosen, layout.all_ranks)
        read, h = gather_shrink(read, a.to(computation_dtype(x, a)), order)

        def add(y: Tensor) -> Tensor:
            y = scatter_expand(y, h, routing.weights, order, b, layout.scales, self._owns(y))
            return self._attach_losses(y, x, routing, adapter)

        return read, add

    def _packed(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        a, b, layout = self._down(adapter), self.molora_B[adapter], self._layout(adapter)
        masks, split = self.context.masks_for(self.name, x), self.context.split_at(x)
        wide = self._cast_input_dtype(x, a.dtype)
        router = self._router(adapter)
        routing = None if router is None else _route(router, _logits(router, wide, split), masks, split)
        weights = None if routing is None else routing.weights
        rank_mask = None if masks is None else masks.rank

        def add(y: Tensor) -> Tensor:
            read, rows = F.dropout(wide, self._drops(adapter, "input")), a
            if self.molora_plan[adapter].shared_a:
                read, rows = linear_of_training_rows(read, a, split), stacked_identities(layout.experts, a)
            drop = self._drops(adapter, "rank")
            y = y + packed_delta(read, rows, b, weights, layout.spread, rank_mask, split, drop)
            return y if routing is None else self._attach_losses(y, x, routing, adapter)

        return x, add

    def _fused(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        split = self.context.split_at(x)
        read, shrunk, *_ = self._reading(x, adapter, "fused")
        h, routing, mask = self._gating(x, *shrunk, adapter)

        def add(y: Tensor) -> Tensor:
            spread, b = self._layout(adapter).spread, self.molora_B[adapter]
            y = expand(y, h, routing, spread, mask, b, split, self._owns(y))
            return y if routing is None else self._attach_losses(y, x, routing, adapter)

        return read, add

    def _joined(self, x: Tensor, adapter: str) -> Tensor:
        _, shrunk, frozen, made = self._reading(x, adapter, self._path(x, adapter))
        assert frozen is not None
        spread, b = self._layout(adapter).spread, self.molora_B[adapter]
        routing: Routing | None
        if made is not None and shrunk.logits is not None:
            routing = replace(made.routing, logits=shrunk.logits)
            y = expand_routed(x, frozen, shrunk, made, spread, b)
        else:
            h, routing, mask = self._gating(x, *shrunk, adapter)
            y = expand_frozen(x, frozen, h, routing, spread, mask, b, self.context.split_at(x))
        return y if routing is None else self._attach_losses(y, x, routing, adapter)

    def _reading(self, x: Tensor, adapter: str, path: str) -> Reading:
        """The narrow products of x: what another layer that reads x made for this one, or made now, for all of them."""
        shared = self.context.shared
        if (found := shared.take(self, x, path)) is not None:
            return found
        drop = self._drops(adapter, "input")
        own = self.molora_A[adapter]
        others = [] if drop else [other for other in shared.companions(self) if other._goes_along(x, own, path)]
        parts = [self._part(x, adapter, path), *(other._part(x, other.active_adapters[0], path) for other in others)]
        in_place = all(layer._unseen() for layer in (self, *others))
        made = [part.made.shrunk for part in parts if part.made is not None]
        members = [part.member for part in parts]
        read, shrunk = shrink(x, members, self.context.split_at(x), drop, in_place, made or None)
        readings = [Reading(read, s, p.member.frozen, p.made) for s, p in zip(shrunk, parts, strict=True)]
        for other, reading in zip(others, readings[1:], strict=True):
            shared.put_aside(other, x, path, reading)
        return readings[0]

    def _part(self, x: Tensor, adapter: str, path: str) -> Part:
        """What this layer wants of x, and what its kernel makes of it."""
        router, base = self._router(adapter), self.base_layer
        frozen = Frozen(base.weight, base.bias) if path in JOINED and isinstance(base, nn.Linear) else None
        member = Member(self._down(adapter), None if router is None else router.score_rows, frozen)
        if path != "kernels" or not isinstance(router, TopKRouter):
            return Part(member, None)
        return Part(member, route_in_kernel(x, member, self._layout(adapter).spread, router.top_k))

    def _goes_along(self, x: Tensor, a: Tensor, path: str) -> bool:
        """Whether this layer, if called with `x`, would take `path` with weights that are at hand and fit those, `a`,
        of the layer called now. Sharded or offloaded weights are at hand only while their own layer runs."""
        if type(self) is not LoraMoeLayer or self._forward_pre_hooks:
            return False
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        adapter = self.active_adapters[0]
        if adapter not in self.molora_A or self._drops(adapter, "input"):
            return False
        own = self.molora_A[adapter]
        router = self._router(adapter)
        rows = None if router is None else router.score_rows
        fits = all(t.dtype == a.dtype and t.device == x.device for t in (own, rows) if t is not None)
        present = type(own) is nn.Parameter and own.shape[1:] == x.shape[-1:]
        return fits and present and self._path(x, adapter) == path

    def _gating(
        self, x: Tensor, h: Tensor, logits: Tensor | None, adapter: str
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        """h with its dropout, the routing, and the mask of the rank rows, as `expand` takes them."""
        masks, split, router = self.context.masks_for(self.name, x), self.context.split_at(x), self._router(adapter)
        if self.molora_plan[adapter].shared_a:
            h = h.repeat(1, self._layout(adapter).experts)
        if (drop := self._drops(adapter, "rank")) > 0:
            h = F.dropout(h, drop)
        if router is not None and logits is None:
            logits = _logits(router, x, split)
        routing = None if router is None or logits is None else _route(router, logits, masks, split)
        mask = None if masks is None else masks.rank
        if mask is not None and mask.dim() > 1:
            mask = mask.reshape(len(mask), -1)
        return h, routing, mask

    def _unseen(self) -> bool:
        """Whether nobody else sees what the frozen layer makes: its output and the gradient of its input.

        Other modules than linear ones may pass on what others hold.
        """
        base = self.base_layer
        watched = base._forward_hooks or base._backward_hooks or base._backward_pre_hooks
        return isinstance(base, (nn.Linear, Conv1D)) and not watched

    def _owns(self, y: Tensor) -> bool:
        """Whether the frozen layer's output may be changed in place."""
        return self._unseen() and y.is_contiguous() and not y._is_view()

    def _layout(self, adapter: str) -> ExpertLayout:
        layout = self.molora_layout[adapter]
        assert isinstance(layout, ExpertLayout)
        return layout

    def _router(self, adapter: str) -> Router | None:
        """None for a single expert."""
        if adapter not in self.molora_router:
            return None
        router = self.molora_router[adapter]
        assert isinstance(router, Router)
        return router

    def _drops(self, adapter: str, what: str) -> float:
        """The chance with which features of the input, or rank activations, are dropped now."""
        if not self.training:
            return 0.0
        dropout = self.molora_dropout[adapter]
        assert isinstance(dropout, nn.ModuleDict)
        return dropout[what].p if what in dropout else 0.0  # type: ignore[return-value]

    def _down(self, adapter: str) -> Tensor:
        """A; in training, where the config asks for it, the one sample of it that this pass uses (DropConnect)."""
        a: Tensor = self.molora_A[adapter]
        drop = self._drops(adapter, "shared_a")
        return F.dropout(a, drop) if drop > 0 else a

    def packed_a(self, adapter: str) -> Tensor:
        """``(R, I)``: A with the rows of every expert, where they are shared too."""
        a: Tensor = self.molora_A[adapter]
        return a.repeat(self._layout(adapter).experts, 1) if self.molora_plan[adapter].shared_a else a

    def _attach_losses(self, y: Tensor, x: Tensor, routing: Routing, adapter: str) -> Tensor:
        loss = self.molora_loss[adapter]
        needed = loss.active and self.training and self.context.attach_losses and torch.is_grad_enabled()
        if not needed and not self.context.record:
            return y
        wanted = EVERYTHING if self.context.record else loss.reads
        statistics = router_statistics(routing, self.context.counted(x), wanted)
        if adapter == self.active_adapters[0]:  # one record per module: adapters may differ in their expert counts
            self.context.observe(self.name, statistics)
        value = loss(self.context, statistics) if needed else None
        if value is None:
            return y
        if self.context.collected is not None:
            self.context.collected.append(value)
            return y
        return attach_loss(y, value, self.context.scale)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``(O, I)`` change of the weight at the adapter's constant gates, or at those of `fixed_gates`.

        Raises:
            GuilomoError: the gates depend on the token, so there is no one matrix.
        """
        gates = self.fixed_gates[adapter] if adapter in self.fixed_gates else self.constant_gates(adapter)
        layout = self.molora_layout[adapter]
        assert isinstance(layout, ExpertLayout)
        a, b = self.packed_a(adapter), self.molora_B[adapter]
        delta: Tensor = (b * (gates.to(b) @ layout.spread.to(b.dtype))) @ a
        if adapter in self.molora_C:
            weight = self._frozen_weight()
            delta = delta + self._through_sequential(weight.T if self._transposed else weight, adapter)
        return delta

    def _through_sequential(self, frozen: Tensor, adapter: str) -> Tensor:
        """What a merged sequential branch adds to the frozen weight ``(O, I)`` or bias ``(O,)``."""
        c, d = self.molora_C[adapter], self.molora_D[adapter]
        added: Tensor = self.sequential_scale[adapter] * (d @ (c @ frozen.to(c)))
        return added

    def _frozen_weight(self) -> Tensor:
        """The weight as it was before anything was merged."""
        if self._frozen is not None:
            return self._frozen[0]
        if self.merged_adapters:
            raise GuilomoError(
                f"Module {self.name!r} has merged adapters, but a sequential branch reads the weight from before. Call "
                "unmerge_adapter() first."
            )
        return self.get_base_weight()

    def constant_gates(self, adapter: str) -> Tensor:
        """``(E,)`` routing weights, when they are the same for every token; otherwise an error."""
        if adapter not in self.molora_router:
            return torch.ones(1, device=self.molora_A[adapter].device)
        router = self.molora_router[adapter]
        if not getattr(router, "static", False):
            raise GuilomoError(
                f"Module {self.name!r} of adapter {adapter!r} cannot be merged: its gates depend on the token "
                f"({type(router).__name__}). Keep the adapter unmerged (PeftModel.from_pretrained), or train with "
                "router='fixed' or one expert per module if it must be merged."
            )
        return router(self.molora_A[adapter].new_zeros(1, self.in_features)).weights[0]  # type: ignore[no-any-return]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the constant-gate change of the active (or given) adapters to the frozen weight.

        Raises:
            GuilomoError: gates depend on the token, or (with `safe_merge`) the result is not finite.
        """
        names = [n for n in (adapter_names or self.active_adapters) if n in self.molora_A]
        for name in names:
            if name in self.merged_adapters:
                continue
            merged, bias = self.get_base_weight() + self._delta_as_stored(name), self._merged_bias(name)
            finite = torch.isfinite(merged).all() and (bias is None or torch.isfinite(bias).all())
            if safe_merge and not finite:
                raise GuilomoError(f"Merging adapter {name!r} into {self.name!r} gives values that are not finite.")
            if self.molora_C and not self.merged_adapters:
                old = self._bias()
                self._frozen = self.get_base_weight(), None if old is None else old.data
            self._set_base(merged, bias)
            self.merged_adapters.append(name)

    def _set_base(self, weight: Tensor, bias: Tensor | None) -> None:
        self.set_base_weight(weight)
        own = self._bias()
        if own is not None and bias is not None:
            own.data = bias

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.get_base_layer(), "bias", None)
        return bias

    def _merged_bias(self, adapter: str) -> Tensor | None:
        """The frozen bias with the part of a sequential branch; None where the adapter does not change it."""
        bias = self._bias()
        if bias is None or adapter not in self.molora_C:
            return None
        before = None if self._frozen is None else self._frozen[1]
        return bias.data + self._through_sequential(bias.data if before is None else before, adapter).to(bias.dtype)

    def unmerge(self) -> None:
        """Takes merged adapters out of the frozen weight again, up to rounding; exactly, with sequential branches."""
        if self._frozen is not None:
            self._set_base(*self._frozen)
            self._frozen = None
            self.merged_adapters.clear()
        while self.merged_adapters:
            self.set_base_weight(self.get_base_weight() - self._delta_as_stored(self.merged_adapters.pop()))

    def _delta_as_stored(self, adapter: str) -> Tensor:
        delta = self.get_delta_weight(adapter)
        weight = self.get_base_weight()
        return (delta.T if self._transposed else delta).to(weight.dtype)

    @property
    def _transposed(self) -> bool:
        """Conv1D stores (in, out); a square one cannot be told by its shape."""
        return type(self.get_base_layer()).__name__ == "Conv1D"

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        if adapter_name in self.molora_C and self._bias() is not None:
            return False  # plain LoRA changes no bias
        routed = adapter_name in self.molora_router and not getattr(self.molora_router[adapter_name], "static", False)
        return not routed or adapter_name in self.fixed_gates

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


def _route(router: Router, logits: Tensor, masks: SelectionMasks | None, split: int | None) -> Routing:
    """The routing under a search's masks."""
    if masks is not None and masks.log_expert is not None:
        logits = shift_by_held_out_rows(logits, masks.log_expert.to(logits.dtype), split)
    return router.route(logits)


def _logits(router: Router, x: Tensor, n: int | None) -> Tensor:
    """The router's logits; in a split batch, only the first `n` rows of `x` feed its parameters."""
    if n is None:
        return router.logits(x)
    frozen = {name: p.detach() for name, p in router.named_parameters()}
    held_out: Routing = torch.func.functional_call(router, frozen, (x[n:],))
    return torch.cat([router.logits(x[:n]), held_out.logits])
