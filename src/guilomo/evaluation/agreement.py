"""Routing agreement: whether a model in half precision sends its tokens to the experts it chooses in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..errors import GuilomoError, invalid
from ..layers import Router
from ..tuner import LoraMoeLayer
from .forward import device_of, evaluating


@dataclass(frozen=True)
class RoutingAgreement:
    """How alike two precisions route the same tokens in one module.

    Attributes:
        tokens: real tokens that were compared.
        same: share of them for which both choose the same experts; of equal scores both take the lowest index.
        moved: mean over tokens of half of ``sum_e |w_e - w'_e|``: how much routing weight lies on other experts.
    """

    tokens: int
    same: float
    moved: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def routing_agreement(
    model: PeftModel, batches: Iterable[Mapping[str, Tensor]], half: torch.dtype | PeftModel = torch.bfloat16
) -> dict[str, RoutingAgreement]:
    """How often every module of the active adapter chooses the same experts in half precision (ours).

    Routers compute in float32 in both, so what differs is their input, which carries the rounding of all layers before:
    tokens change their experts where scores nearly tie. Both run in evaluation mode. Modules whose gates depend on no
    token have nothing to compare and are left out.

    Args:
        model: the adapted model in full precision.
        batches: the model's inputs, `attention_mask` among them where rows are padded; `labels` are ignored.
        half: a dtype, to run the same model under autocast to it; or the same model held in half precision, such as
            ``copy.deepcopy(model).bfloat16()``.

    Returns:
        The agreement by module name.

    Raises:
        GuilomoError: the model routes nothing, `half` has other modules, or the batches have no real token.
    """
    other = half if isinstance(half, nn.Module) else model
    first, second = _routed_layers(model), _routed_layers(other)
    if not first:
        raise GuilomoError("No module of the active adapter routes tokens, so there is no agreement to measure.")
    if first.keys() != second.keys():
        raise invalid("half", sorted(second.keys() ^ first.keys())[0], "the same model: this module is in only one")
    totals = {name: torch.zeros(3, dtype=torch.float64) for name in first}
    for batch in batches:
        exact = _routings(model, first, batch)
        if isinstance(half, torch.dtype):
            with torch.autocast(device_of(model).type, half):
                rounded = _routings(model, second, batch)
        else:
            rounded = _routings(other, second, batch)
        for name, total in totals.items():
            total += _compared(exact[name], rounded[name])
    return {name: _agreement(name, total) for name, total in totals.items()}


@dataclass(frozen=True)
class _Seen:
    """The routing weights ``(T, E)`` and the chosen experts ``(T, E)`` of one pass, and which tokens ``(T,)`` count."""

    weights: Tensor
    chosen: Tensor
    real: Tensor


def _routed_layers(model: PeftModel) -> dict[str, LoraMoeLayer]:
    """The modules of the active adapter whose gates depend on the token."""
    found = {}
    for layer in model.modules():
        if isinstance(layer, LoraMoeLayer) and model.active_adapter in layer.molora_router:
            router = layer.molora_router[model.active_adapter]
            if isinstance(router, Router) and not router.static:
                found[layer.name] = layer
    return found


def _routings(model: PeftModel, layers: Mapping[str, LoraMoeLayer], batch: Mapping[str, Tensor]) -> dict[str, _Seen]:
    device = device_of(model)
    seen: dict[str, _Seen] = {}
    with _watched(layers, model.active_adapter, seen), evaluating(model):
        model(**{key: value.to(device) for key, value in batch.items() if key != "labels"})
    return seen


@contextmanager
def _watched(layers: Mapping[str, LoraMoeLayer], adapter: str, seen: dict[str, _Seen]) -> Iterator[None]:
    hooks = [layer.register_forward_pre_hook(partial(_see, seen, adapter)) for layer in layers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _see(seen: dict[str, _Seen], adapter: str, layer: LoraMoeLayer, args: tuple[Any, ...]) -> None:
    """Pre-forward hook of a mixture: what its router is about to say."""
    routing = layer.routing(args[0], adapter)
    assert routing is not None, "single experts are not routed"
    weights, chosen = routing.weights.double().flatten(0, -2).cpu(), routing.chosen.flatten(0, -2).cpu()
    real = layer.context.counted(args[0])
    counted = torch.ones(len(weights)) if real is None else real.reshape(-1).cpu()
    seen[layer.name] = _Seen(weights, chosen, counted.bool())


def _compared(exact: _Seen, rounded: _Seen) -> Tensor:
    """``(3,)``: tokens, those with the same experts, and the weight on other experts."""
    real = exact.real
    same = (exact.chosen == rounded.chosen).all(-1)[real].sum()
    moved = (exact.weights - rounded.weights).abs().sum(-1)[real].sum() / 2
    return torch.stack([real.sum().double(), same.double(), moved])


def _agreement(name: str, total: Tensor) -> RoutingAgreement:
    tokens, same, moved = total.tolist()
    if not tokens:
        raise GuilomoError(f"Module {name!r} has seen no token, so nothing was compared. Give at least one row.")
    return RoutingAgreement(int(tokens), same / tokens, moved / tokens)
