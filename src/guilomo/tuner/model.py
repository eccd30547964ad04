"""The PEFT tuner: replaces linears by mixtures, checks what it loads, and refuses what cannot be done."""

from __future__ import annotations

import operator
import re
from collections.abc import Hashable
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from guilomo.allocation.names import depths_of
from guilomo.allocation.plan import Allocation, ModulePlan
from guilomo.errors import GuilomoError
from guilomo.layers.routers import router_class, router_options
from guilomo.layers.routing import Place
from guilomo.tuner.config import LoraMoeConfig
from guilomo.tuner.context import context_of, remove_context
from guilomo.tuner.feed_forward import FeedForwardLayer
from guilomo.tuner.layer import LoraMoeLayer
from guilomo.tuner.modules import linear_shape
from guilomo.tuner.resolve import balance_groups, resolve_allocation
from guilomo.tuner.router_loss import RouterLoss, router_losses

_NO_LOSS = RouterLoss("", 1, None, 0.0, 0.0, 1.0)


class LoraMoeModel(BaseTuner):
    """Attaches mixtures of low-rank experts to a model, as `LoraMoeConfig` says."""

    prefix = "molora_"
    tuner_layer_cls = LoraMoeLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]
    _plans: dict[str, Allocation]
    _losses: dict[str, dict[str, RouterLoss]]
    _shared: dict[str, dict[Hashable, nn.Module]]

    def _resolve(self, model: nn.Module, config: LoraMoeConfig, adapter_name: str) -> None:
        """Fixes the plan of an adapter and writes it into its config, from where it is saved."""
        plan = resolve_allocation(model, config)
        _refuse_two_kinds(model, plan)
        config.allocation = plan.to_dict()
        config.check_names()
        # The plan says these now; PEFT would warn about patterns and exclusions that match nothing it adapts.
        config.rank_pattern = {}
        config.exclude_modules = None
        config.target_modules = set(plan.adapted())  # type: ignore[assignment]
        # Plain attributes: nn.Module would take dicts of modules for submodules, but these hold none.
        self.__dict__.setdefault("_plans", {})[adapter_name] = plan
        losses = router_losses(config, balance_groups(plan, config.balance_over), adapter_name)
        self.__dict__.setdefault("_losses", {})[adapter_name] = losses
        self.__dict__.setdefault("_shared", {})[adapter_name] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT, with the plan fixed first."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, LoraMoeConfig)
        self._resolve(model, config, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_target_module_exists(self, config: LoraMoeConfig, key: str) -> bool:  # type: ignore[override]
        plan = next(self._plans[adapter] for adapter, known in self.peft_config.items() if known is config)
        return key in plan.modules and plan[key].adapted

    def _create_and_replace(  # type: ignore[override]
        self,
        config: LoraMoeConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        plan = self._plans[adapter_name]
        loss = self._losses[adapter_name].get(current_key, _NO_LOSS)
        place, hosts = self._place(adapter_name, config, current_key)
        if isinstance(target, LoraMoeLayer):
            target.update_layer(adapter_name, plan, config, loss, place, hosts)
            return
        shape = linear_shape(target)
        assert shape is not None, "the plan was checked against the model's linear layers"
        kind = _layer_class(plan[current_key])
        layer = kind(target, current_key, shape, context_of(self.model))
        layer._active_adapter = adapter_name
        layer.quantization_backend = resolve_quantization_backend(target, **self._torchao_options())
        layer.update_layer(adapter_name, plan, config, loss, place, hosts)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _place(self, adapter: str, config: LoraMoeConfig, module: str) -> tuple[Place, bool]:
        """Where a module stands, and whether it is the first of those that share a part of their routers.

        The others hold that part without registering it, so that it is saved, counted and optimised once.
        """
        plan, kind = self._plans[adapter], router_class(config.router)
        depths = depths_of(plan.adapted())
        depth = depths[module] / max(*depths.values(), 1)
        experts, in_features = plan[module].experts, plan[module].in_features
        key = kind.shared_key(experts, in_features) if plan[module].routes else None
        if key is None:
            return Place(depth), False
        held, hosts = self._shared[adapter], key not in self._shared[adapter]
        if hosts:
            held[key] = kind.shared(experts, in_features, **router_options(config.router, config.router_options))
        return Place(depth, held[key]), hosts

    def _torchao_options(self) -> dict[str, Any]:
        try:
            getter = operator.attrgetter("hf_quantizer.quantization_config.get_apply_tensor_subclass")
            return {"get_apply_tensor_subclass": getter(self.model)}
        except AttributeError:
            return {}

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._plans.pop(adapter_name, None)
        self._losses.pop(adapter_name, None)
        self._shared.pop(adapter_name, None)

    def _check_merge_allowed(self) -> None:
        """Refuses before any weight is touched."""
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, LoraMoeLayer):
                for adapter in module.molora_A:
                    module.constant_gates(adapter)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        model: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[assignment]
        remove_context(model)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        refuse_other_weights(model, adapter_name, remapped)
        return remapped


def _layer_class(plan: ModulePlan) -> type[LoraMoeLayer]:
    return FeedForwardLayer if plan.role else LoraMoeLayer


def _refuse_two_kinds(model: nn.Module, plan: Allocation) -> None:
    for name, module in plan.adapted().items():
        layer = model.get_submodule(name)
        if isinstance(layer, LoraMoeLayer) and type(layer) is not _layer_class(module):
            raise GuilomoError(
                f"Module {name!r} already has an adapter of another kind: experts of whole feed-forwards and other "
                "mixtures cannot share it. Attach this adapter to a base model of its own."
            )


def refuse_other_weights(model: nn.Module, adapter_name: str, given: dict[str, Tensor]) -> None:
    """Strict loading: the given tensors must be exactly those of the model's adapter.

    Raises:
        GuilomoError: naming missing or extra keys, wrong shapes, values that are not finite, or modules whose ranks
            follow another allocation.
    """
    ours = re.compile(rf"(^|\.)molora_\w+\.{re.escape(adapter_name)}(\.|$)")
    expected = {k: v for k, v in model.state_dict().items() if ours.search(k)}
    loose = {k.removeprefix("base_model.model."): v for k, v in given.items() if ".molora_" in k}
    wanted = {k.removeprefix("base_model.model."): v for k, v in expected.items()}
    broken = [k for k, v in given.items() if not v.isfinite().all()]
    if broken:
        raise GuilomoError(
            f"The weights of adapter {adapter_name!r} are damaged: {broken[0]} holds values that are not finite. Copy "
            "the adapter again, or train it again."
        )
    problems = [f"missing {k}" for k in wanted if k not in loose]
    problems += [f"extra {k}" for k in loose if k not in wanted]
    for key in wanted.keys() & loose.keys():
        if wanted[key].shape != loose[key].shape:
            problems.append(f"{key} has shape {tuple(loose[key].shape)}, the plan needs {tuple(wanted[key].shape)}")
        elif key.endswith(".ranks") and loose[key].tolist() != wanted[key].tolist():
            problems.append(f"{key} is {loose[key].tolist()}, the plan says {wanted[key].tolist()}")
    if problems:
        shown = "; ".join(sorted(problems)[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise GuilomoError(
            f"The weights do not belong to the allocation of adapter {adapter_name!r}: {shown}. "
            "Load the adapter together with its own adapter_config.json, into the base model it was trained on."
        )
