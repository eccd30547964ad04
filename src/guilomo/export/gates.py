"""The gates a mixture has on average: one number per expert in place of one per expert and token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from guilomo.errors import GuilomoError
from guilomo.evaluation.forward import device_of, evaluating
from guilomo.tuner import LoraMoeConfig, LoraMoeLayer


def mixture_config(model: PeftModel) -> LoraMoeConfig:
    """The configuration of the model's active adapter.

    Raises:
        GuilomoError: the adapter is no mixture.
    """
    adapter = model.active_adapter
    config = model.peft_config[adapter]
    if not isinstance(config, LoraMoeConfig):
        kind = str(config.peft_type).rpartition(".")[2]
        raise GuilomoError(
            f"Adapter {adapter!r} is a {kind} adapter; only mixtures are exported. Serve it as it is, or merge it with "
            "PEFT's merge_and_unload()."
        )
    return config


def refuse_unlike_lora(model: PeftModel) -> None:
    """Refuses structures that no plain LoRA can have, whatever the gates.

    Raises:
        GuilomoError: a module has a sequential branch, which also changes the bias.
    """
    plan = mixture_config(model).plan
    for name, module in plan.adapted().items() if plan is not None else ():
        if module.sequential_rank:
            raise GuilomoError(
                f"Module {name!r} has a sequential branch (sequential_rank), which changes the bias too: plain LoRA "
                "cannot. Merge it into the weights (--to merged), which is exact."
            )


def mixture_layers(model: PeftModel) -> dict[str, LoraMoeLayer]:
    """The adapted modules of the model's active adapter by name.

    Raises:
        GuilomoError: the adapter is no mixture, or its experts are whole feed-forwards.
    """
    adapter = model.active_adapter
    _refuse_feed_forwards(mixture_config(model))
    layers = (m for m in model.modules() if isinstance(m, LoraMoeLayer) and adapter in m.molora_A)
    return {layer.name: layer for layer in layers}


def _refuse_feed_forwards(config: LoraMoeConfig) -> None:
    block = next((m.block for m in config.plan.modules.values() if m.role), None) if config.plan is not None else None
    if block is not None:
        raise GuilomoError(
            f"The experts of {block!r} are whole feed-forwards, weighted behind the nonlinearity: no change of weights "
            "does the same, whatever the gates, so there is nothing to export. Serve the adapter as it is."
        )


def routed_layers(model: PeftModel) -> dict[str, LoraMoeLayer]:
    """Those of `mixture_layers` whose gates depend on the token."""
    adapter = model.active_adapter
    return {name: layer for name, layer in mixture_layers(model).items() if _routes(layer, adapter)}


def _routes(layer: LoraMoeLayer, adapter: str) -> bool:
    return adapter in layer.molora_router and not getattr(layer.molora_router[adapter], "static", False)


def refuse_routed(model: PeftModel) -> None:
    """Refuses a mixture that has no one matrix per module.

    Raises:
        GuilomoError: the gates of a module depend on the token.
    """
    for layer in mixture_layers(model).values():
        try:
            layer.constant_gates(model.active_adapter)
        except GuilomoError as error:
            raise GuilomoError(
                f"{error} Or export it to plain LoRA at its mean gates (--to stacked or --to svd), which measures what "
                "that loses."
            ) from None


def mean_gates(model: PeftModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean routing weight of every expert of the active adapter over the real tokens of `batches` (ours).

    Routing weights are those of evaluation mode, summed in float64; padding is never counted. Where no module routes,
    the gates are known and `batches` is not read.

    Args:
        model: the adapted model.
        batches: the model's inputs, `attention_mask` among them where rows are padded; `labels` are ignored.

    Returns:
        ``(E,)`` float64 by module name.

    Raises:
        GuilomoError: the adapter is no mixture, or the batches have no real token for a module.
    """
    layers, adapter = mixture_layers(model), model.active_adapter
    sums = {name: _GateSum() for name in routed_layers(model)}
    if sums:
        _run(model, batches, {layers[name]: total for name, total in sums.items()})
    return {
        name: sums[name].mean(name) if name in sums else layer.constant_gates(adapter).double().cpu()
        for name, layer in layers.items()
    }


class _GateSum:
    """Sums of routing weights ``(E,)`` and of tokens ``()``."""

    def __init__(self) -> None:
        self.weight: Tensor | float = 0.0
        self.tokens: Tensor | float = 0.0

    def add(self, adapter: str, layer: LoraMoeLayer, args: tuple[Any, ...]) -> None:
        """Pre-forward hook of a mixture: what its router is about to say."""
        routing = layer.routing(args[0], adapter)
        assert routing is not None, "single experts are not routed"
        weights = routing.weights.double().flatten(0, -2)
        real = layer.context.counted(args[0])
        share = weights.new_ones(len(weights)) if real is None else real.reshape(-1).to(weights)
        self.weight = self.weight + share @ weights
        self.tokens = self.tokens + share.sum()

    def mean(self, name: str) -> Tensor:
        if not isinstance(self.weight, Tensor) or not self.tokens > 0:
            raise GuilomoError(f"Module {name!r} has seen no token, so it has no mean gates. Give at least one row.")
        return (self.weight / self.tokens).cpu()


def _run(model: PeftModel, batches: Iterable[Mapping[str, Tensor]], sums: Mapping[LoraMoeLayer, _GateSum]) -> None:
    device = device_of(model)
    hooks = [layer.register_forward_pre_hook(partial(total.add, model.active_adapter)) for layer, total in sums.items()]
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
