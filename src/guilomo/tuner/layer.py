"""One adapted linear: the frozen layer plus the packed experts of each adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from guilomo.allocation.plan import Allocation, ModuleShape
from guilomo.errors import GuilomoError
from guilomo.layers.attach import attach_loss
from guilomo.layers.balance import EVERYTHING, router_statistics
from guilomo.layers.fused import computation_dtype, expand, shrink
from guilomo.layers.packed import ExpertLayout, packed_delta
from guilomo.layers.paths import SORTS_FROM, forced, sorting_pays
from guilomo.layers.routers import TopKRouter, router_class, router_options
from guilomo.layers.routing import NOWHERE, Place, Router, Routing, Tokens
from guilomo.layers.sorted import gather_shrink, scatter_expand, sort_tokens
from guilomo.layers.split import shift_by_held_out_rows
from guilomo.tuner.config import LoraMoeConfig
from guilomo.tuner.context import RoutingContext, SelectionMasks
from guilomo.tuner.factors import DownProjections
from guilomo.tuner.router_loss import RouterLoss

Addition = Callable[[Tensor], Tensor]
"""Adds a mixture to the output of the frozen layer."""


class LoraMoeLayer(nn.Module, BaseTunerLayer):
    """``y = W0 x + B (s * gate * A x)`` for every active adapter.

    Parameters, keyed by adapter name: ``molora_A (R, I)``, ``molora_B (O, R)``, ``molora_router`` (absent for a single
    expert, whose gate is 1), ``molora_shared`` (what routers have in common, in the first layer of those that share
    it). ``molora_layout`` holds the ranks, saved with the weights.

    The base layer is any module with ``in_features`` and ``out_features`` (`nn.Linear`, transformers' `Conv1D`,
    quantised linears); it is only ever called, never read.
    """

    adapter_layer_names = ("molora_A", "molora_B", "molora_router", "molora_shared")
    other_param_names = ("molora_layout", "molora_dropout", "molora_loss", "fixed_gates")

    def __init__(self, base_layer: nn.Module, name: str, shape: ModuleShape, context: RoutingContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.in_features, self.out_features = shape
        self.context = context
        self.molora_A = DownProjections()
        self.molora_B = nn.ParameterDict()
        self.molora_router = nn.ModuleDict()
        self.molora_shared = nn.ModuleDict()
        self.molora_layout = nn.ModuleDict()
        self.molora_dropout = nn.ModuleDict()
        self.molora_loss: dict[str, RouterLoss] = {}
        self.fixed_gates: dict[str, Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(
        self,
        adapter: str,
        plan: Allocation,
        config: LoraMoeConfig,
        loss: RouterLoss,
        place: Place = NOWHERE,
        hosts: bool = False,
    ) -> None:
        """Adds or replaces the experts of one adapter, as `plan` says for this module.

        Args:
            adapter: its name. plan: of the whole model. config: of the adapter. loss: of the group of this module.
            place: where the module stands in the model.
            hosts: whether the shared part of `place` is saved and trained with this module.
        """
        module = plan[self.name]
        a = nn.Parameter(torch.empty(module.rank, self.in_features))
        b = nn.Parameter(torch.zeros(self.out_features, module.rank))
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if not config.init_lora_weights:
            nn.init.normal_(b, std=0.02)
        kind: Any = router_class(config.router)
        options = router_options(config.router, config.router_options)
        routed = module.experts > 1
        recipe = kind.frozen_rows(self.name, self.in_features, module.experts, module.top_k, **options)
        if routed and recipe is not None:
            a = nn.Parameter(recipe(), requires_grad=False)
            self.molora_A.frozen[adapter] = recipe
        self.molora_A[adapter] = a
        self.molora_B[adapter] = b
        self.molora_layout[adapter] = ExpertLayout(module.ranks, plan.scales(self.name))
        self.molora_dropout[adapter] = nn.ModuleDict({config.dropout_on: nn.Dropout(config.lora_dropout)})
        self.molora_loss[adapter] = loss
        if routed:
            self.molora_router[adapter] = kind(self.in_features, module.experts, module.top_k, place, **options)
            if hosts and place.shared is not None:
                self.molora_shared[adapter] = place.shared
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; what is frozen stays so."""
        super().set_adapter(adapter_names, inference_mode)
        self.molora_A.freeze()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        additions = []
        for adapter in self.active_adapters:
            if adapter in self.molora_A:
                x, add = self._begin(x, adapter)
                additions.append(add)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for add in additions:
            y = add(y)
        return y.to(dtype)

    def _begin(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        """The x that the frozen layer is to read, and what adds the mixture, router loss attached, to its output."""
        if torch.compiler.is_compiling() or forced() == "packed":
            return self._packed(x, adapter)
        return self._sorted(x, adapter) if self._sorts(x, adapter) else self._fused(x, adapter)

    def _sorts(self, x: Tensor, adapter: str) -> bool:
        """Whether the sorted path can be taken, and is asked for or pays."""
        tokens, asked = x.shape[:-1].numel(), forced()
        if asked == "fused" or (asked is None and tokens < SORTS_FROM):
            return False
        router = self._router(adapter)
        searching = self.context.masks.get(self.name) is not None or self.context.training_rows is not None
        dropping = self._drops(adapter, "input") > 0 or self._drops(adapter, "rank") > 0
        if not isinstance(router, TopKRouter) or searching or dropping or not self._unseen():
            return False
        a = self.molora_A[adapter]
        dtype = computation_dtype(x, a)
        return asked == "sorted" or sorting_pays(tokens, len(a), router.top_k, router.experts, dtype, x.device)

    def _sorted(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        a, b, layout = self.molora_A[adapter], self.molora_B[adapter], self._layout(adapter)
        router = self._router(adapter)
        assert router is not None
        read, _, logits = shrink(x, a.detach()[:0], router.score_rows, None, 0.0, True)
        assert logits is not None
        routing = self._route(router, logits, x, None, None)
        order = sort_tokens(routing.chosen, layout.all_ranks)
        read, h = gather_shrink(read, a.to(computation_dtype(x, a)), order)

        def add(y: Tensor) -> Tensor:
            y = scatter_expand(y, h, routing.weights, order, b, layout.scales, self._owns(y))
            return self._attach_losses(y, x, routing, adapter)

        return read, add

    def _packed(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        a, b, layout = self.molora_A[adapter], self.molora_B[adapter], self._layout(adapter)
        masks, split = self.context.masks_for(self.name, x), self.context.split_at(x)
        wide = self._cast_input_dtype(x, a.dtype)
        router = self._router(adapter)
        routing = None
        if router is not None:
            read = F.linear(wide, a) if router.reads_ranks else wide
            routing = self._route(router, _logits(router, read, split), wide, masks, split)
        weights = None if routing is None else routing.weights
        rank_mask = None if masks is None else masks.rank

        def add(y: Tensor) -> Tensor:
            dropped = F.dropout(wide, self._drops(adapter, "input"))
            drop = self._drops(adapter, "rank")
            y = y + packed_delta(dropped, a, b, weights, layout.spread, rank_mask, split, drop)
            return y if routing is None else self._attach_losses(y, x, routing, adapter)

        return x, add

    def _fused(self, x: Tensor, adapter: str) -> tuple[Tensor, Addition]:
        b, layout = self.molora_B[adapter], self._layout(adapter)
        masks, split = self.context.masks_for(self.name, x), self.context.split_at(x)
        router = self._router(adapter)
        rows = None if router is None else router.score_rows
        read, h, logits = shrink(x, self.molora_A[adapter], rows, split, self._drops(adapter, "input"), self._unseen())
        if router is not None and logits is None:
            seen = h.view(*x.shape[:-1], -1) if router.reads_ranks else x
            logits = _logits(router, seen, split)
        routing = None if router is None or logits is None else self._route(router, logits, x, masks, split)
        if (drop := self._drops(adapter, "rank")) > 0:
            h = F.dropout(h, drop)
        rank_mask = None if masks is None or masks.rank is None else masks.rank
        if rank_mask is not None and rank_mask.dim() > 1:
            rank_mask = rank_mask.reshape(len(rank_mask), -1)

        def add(y: Tensor) -> Tensor:
            y = expand(y, h, routing, layout.spread, rank_mask, b, split, self._owns(y))
            return y if routing is None else self._attach_losses(y, x, routing, adapter)

        return read, add

    def _route(
        self, router: Router, logits: Tensor, x: Tensor, masks: SelectionMasks | None, split: int | None
    ) -> Routing:
        """The routing of the tokens of `x`, which the router is told of unless it is a recomputation."""
        tokens = self._tokens(router, x)
        routing = _route(router, logits, tokens, masks, split)
        if self.training and self.context.in_forward:
            router.observe(routing, tokens)
        return routing

    def _tokens(self, router: Router, x: Tensor) -> Tokens:
        if not router.reads:
            return Tokens(x)
        real = self.context.counted(x) if "real" in router.reads else None
        return Tokens(x, real, self.context.tasks_for(x) if "task" in router.reads else None)

    def routing(self, x: Tensor, adapter: str = "default") -> Routing | None:
        """The routing of ``x (N, ..., I)`` by an adapter; None for a single expert."""
        router = self._router(adapter)
        if router is None:
            return None
        x = self._cast_input_dtype(x, self.molora_A[adapter].dtype)
        read = F.linear(x, self.molora_A[adapter]) if router.reads_ranks else x
        return router.route(router.logits(read), self._tokens(router, x))

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

    def _attach_losses(self, y: Tensor, x: Tensor, routing: Routing, adapter: str) -> Tensor:
        loss = self.molora_loss[adapter]
        needed = loss.active and self.training and self.context.attach_losses and torch.is_grad_enabled()
        if not needed and not self.context.record:
            return y
        wanted = (EVERYTHING if self.context.record else frozenset()) | (loss.reads if needed else frozenset())
        tasks = self.context.batch_tasks(x) if "rows" in wanted else None
        statistics = router_statistics(routing, self.context.counted(x), wanted, tasks)
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
        a, b = self.molora_A[adapter], self.molora_B[adapter]
        delta: Tensor = (b * (gates.to(b) @ layout.spread.to(b.dtype))) @ a
        return delta

    def constant_gates(self, adapter: str) -> Tensor:
        """``(E,)`` routing weights, when they are the same for every token; otherwise an error."""
        if adapter not in self.molora_router:
            return torch.ones(1, device=self.molora_A[adapter].device)
        router = self.molora_router[adapter]
        if getattr(router, "static_by_task", False) and adapter in self.fixed_gates:
            return self.fixed_gates[adapter]
        if not getattr(router, "static", False):
            raise GuilomoError(
                f"Module {self.name!r} of adapter {adapter!r} cannot be merged: its gates depend on the token "
                f"({type(router).__name__}). {_of_one_task(router)}Keep the adapter unmerged "
                "(PeftModel.from_pretrained), or train with router='fixed' or one expert per module if it must be "
                "merged."
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
            merged = self.get_base_weight() + self._delta_as_stored(name)
            if safe_merge and not torch.isfinite(merged).all():
                raise GuilomoError(f"Merging adapter {name!r} into {self.name!r} gives values that are not finite.")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes merged adapters out of the frozen weight again, up to rounding."""
        while self.merged_adapters:
            self.set_base_weight(self.get_base_weight() - self._delta_as_stored(self.merged_adapters.pop()))

    def _delta_as_stored(self, adapter: str) -> Tensor:
        delta = self.get_delta_weight(adapter)
        weight = self.get_base_weight()
        # Conv1D stores (in, out); a square one cannot be told by its shape.
        stored = delta.T if type(self.get_base_layer()).__name__ == "Conv1D" else delta
        return stored.to(weight.dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        routed = adapter_name in self.molora_router and not getattr(self.molora_router[adapter_name], "static", False)
        return not routed or adapter_name in self.fixed_gates

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


def _of_one_task(router: nn.Module) -> str:
    """What can be merged of a router whose gates are the same for all tokens of a task."""
    if not getattr(router, "static_by_task", False):
        return ""
    return "One task can be merged: do it within guilomo.tuner.fixed_gates(model, task_gates(model, task)). "


def _route(router: Router, logits: Tensor, tokens: Tokens, masks: SelectionMasks | None, split: int | None) -> Routing:
    """The routing under a search's masks."""
    if masks is not None and masks.log_expert is not None:
        logits = shift_by_held_out_rows(logits, masks.log_expert.to(logits.dtype), split)
    return router.route(logits, tokens)


def _logits(router: Router, x: Tensor, n: int | None) -> Tensor:
    """The router's logits; in a split batch, only the first `n` rows of `x` feed its parameters."""
    if n is None:
        return router.logits(x)
    frozen = {name: p.detach() for name, p in router.named_parameters()}
    held_out: Routing = torch.func.functional_call(router, frozen, (x[n:],))
    return torch.cat([router.logits(x[:n]), held_out.logits])
