"""The layer that replaces a linear: its frozen base with any number of mixtures, keyed by adapter name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from guilomo.allocation.plan import Allocation, ModulePlan, ModuleShape
from guilomo.errors import GuilomoError
from guilomo.layers.packed import ExpertLayout
from guilomo.layers.routers import router_class, router_options
from guilomo.layers.routing import NOWHERE, Place, Router, Routing
from guilomo.tuner.config import LoraMoeConfig
from guilomo.tuner.context import RoutingContext
from guilomo.tuner.factors import DownProjections
from guilomo.tuner.forward import adapted_output
from guilomo.tuner.mixture import Mixture
from guilomo.tuner.router_loss import RouterLoss


class LoraMoeLayer(nn.Module, BaseTunerLayer):
    """``y = W0 x + B (s * gate * A x)`` for every active adapter.

    Parameters, keyed by adapter name: ``molora_A (R, I)``, or ``(r, I)`` where all experts of rank r read one A;
    ``molora_B (O, R)``; ``molora_router`` (absent for a single expert, whose gate is 1); ``molora_shared`` (what
    routers have in common, in the first layer of those that share it). ``molora_layout`` holds the ranks, saved with
    the weights. With a sequential branch (`guilomo.layers.sequential`) also ``molora_C (r_b, O)`` and
    ``molora_D (O, r_b)``.

    The base layer is any module with ``in_features`` and ``out_features`` (`nn.Linear`, transformers' `Conv1D`,
    quantised linears). How the layer computes is in `guilomo.tuner.forward`.
    """

    adapter_layer_names = ("molora_A", "molora_B", "molora_C", "molora_D", "molora_router", "molora_shared")
    other_param_names = (
        "molora_layout",
        "molora_dropout",
        "molora_plan",
        "molora_train",
        "mixtures",
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
        self.molora_A = DownProjections()
        self.molora_B = nn.ParameterDict()
        self.molora_C = nn.ParameterDict()
        self.molora_D = nn.ParameterDict()
        self.molora_router = nn.ModuleDict()
        self.molora_shared = nn.ModuleDict()
        self.molora_layout = nn.ModuleDict()
        self.molora_dropout = nn.ModuleDict()
        self.molora_plan: dict[str, ModulePlan] = {}
        self.molora_train: dict[str, str] = {}
        self.mixtures: dict[str, Mixture] = {}
        self.sequential_scale: dict[str, float] = {}
        self.fixed_gates: dict[str, Tensor] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._frozen: tuple[Tensor, Tensor | None] | None = None

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
        kind: Any = router_class(config.router)
        options = router_options(config.router, config.router_options)
        a = nn.Parameter(torch.empty(module.rows_of_a, self.in_features))
        b = nn.Parameter(torch.zeros(self.out_features, module.rank))
        self._start(a, b, config)
        if module.routes:
            recipe = kind.frozen_rows(self.name, self.in_features, module.experts, module.top_k, **options)
            if recipe is not None:
                a = nn.Parameter(recipe(), requires_grad=False)
                self.molora_A.frozen[adapter] = recipe
            self.molora_router[adapter] = kind(self.in_features, module.experts, module.top_k, place, **options)
            if hosts and place.shared is not None:
                self.molora_shared[adapter] = place.shared
        self.molora_A[adapter] = a
        self.molora_B[adapter] = b
        if module.sequential_rank:
            self.molora_C[adapter] = nn.Parameter(torch.empty(module.sequential_rank, self.out_features))
            self.molora_D[adapter] = nn.Parameter(torch.zeros(self.out_features, module.sequential_rank))
            self._start(self.molora_C[adapter], self.molora_D[adapter], config)
        self.sequential_scale[adapter] = plan.sequential_scale(self.name)
        layout = ExpertLayout(module.ranks or (0,), plan.scales(self.name) or (0.0,))
        drops = {config.dropout_on: nn.Dropout(config.lora_dropout), "shared_a": nn.Dropout(config.drop_connect)}
        self.molora_layout[adapter] = layout
        self.molora_dropout[adapter] = nn.ModuleDict(drops)
        self.molora_plan[adapter] = module
        self.molora_train[adapter] = config.train
        self.mixtures[adapter] = Mixture(self, adapter, module, layout, self._router(adapter), loss, drops)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    @staticmethod
    def _start(down: Tensor, up: Tensor, config: LoraMoeConfig) -> None:
        if len(down):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        if not config.init_lora_weights:
            nn.init.normal_(up, std=0.02)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; what is frozen stays so."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As in PEFT; what is frozen stays so."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        """What is made again from a seed, and experts where only routers are trained."""
        self.molora_A.freeze()
        for adapter, trained in self.molora_train.items():
            if trained == "router":
                for factors in (self.molora_A, self.molora_B, self.molora_C, self.molora_D):
                    if adapter in factors:
                        factors[adapter].requires_grad_(False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        mixtures = [self.mixtures[adapter] for adapter in self.active_adapters if adapter in self.mixtures]
        return adapted_output(mixtures, self.base_layer, x, args, kwargs)

    def routing(self, x: Tensor, adapter: str = "default") -> Routing | None:
        """The routing of ``x (N, ..., I)`` by an adapter; None for a single expert."""
        mixture = self.mixtures[adapter]
        if mixture.router is None:
            return None
        x = self._cast_input_dtype(x, mixture.a.dtype)
        read = F.linear(x, mixture.a) if mixture.router.reads_ranks else x
        return mixture.router.route(mixture.router.logits(read), mixture.tokens(x))

    def sequential(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """``C (r_b, O)``, ``D (O, r_b)`` and the scale of an adapter's sequential branch."""
        return self.molora_C[adapter], self.molora_D[adapter], self.sequential_scale[adapter]

    def _router(self, adapter: str) -> Router | None:
        """None for a single expert."""
        if adapter not in self.molora_router:
            return None
        router = self.molora_router[adapter]
        assert isinstance(router, Router)
        return router

    def packed_a(self, adapter: str) -> Tensor:
        """``(R, I)``: A with the rows of every expert, where they are shared too."""
        a: Tensor = self.molora_A[adapter]
        return a.repeat(self.mixtures[adapter].layout.experts, 1) if self.molora_plan[adapter].shared_a else a

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``(O, I)`` change of the weight at the adapter's constant gates, or at those of `fixed_gates`.

        Raises:
            GuilomoError: the gates depend on the token, so there is no one matrix.
        """
        gates = self.fixed_gates[adapter] if adapter in self.fixed_gates else self.constant_gates(adapter)
        layout = self.mixtures[adapter].layout
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


def _of_one_task(router: nn.Module) -> str:
    """What can be merged of a router whose gates are the same for all tokens of a task."""
    if not getattr(router, "static_by_task", False):
        return ""
    return "One task can be merged: do it within guilomo.tuner.fixed_gates(model, task_gates(model, task)). "
