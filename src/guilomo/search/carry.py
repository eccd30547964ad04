"""Starts the second stage from the weights of the experts that the search selected."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from guilomo.errors import GuilomoError
from guilomo.layers.packed import ExpertLayout
from guilomo.search.vectors import SelectionVectors
from guilomo.tuner import LoraMoeLayer


@torch.no_grad()
def carry_weights(searched: nn.Module, vectors: SelectionVectors, final: nn.Module) -> None:
    """Copies selected experts and rank rows from the searched model into a fresh one (ours).

    Expert e of the final plan, of rank r, takes the first r rows of expert e of the search. Scales and rank masks are
    folded into B, so that a kept row contributes what it contributed; the routers' rows are copied, without the
    search's offset, which a bias-free router cannot hold. Other trained modules (heads) are copied whole.

    Raises:
        GuilomoError: a module of `final` is no plain mixture.
    """
    tied = next((m.name for m in final.modules() if isinstance(m, LoraMoeLayer) and _structured(m)), None)
    if tied is not None:
        raise GuilomoError(
            f"Module {tied!r} is no plain mixture, so it cannot take over the weights of a search. Start it afresh."
        )
    sources = {m.name: m for m in searched.modules() if isinstance(m, LoraMoeLayer)}
    masks = vectors.masks(detach=True)
    for layer in final.modules():
        if isinstance(layer, LoraMoeLayer):
            rank_mask = masks[layer.name].rank
            assert rank_mask is not None
            if vectors.sampled:  # a row that was drawn contributed whole
                rank_mask = torch.ones_like(rank_mask)
            _carry_layer(sources[layer.name], layer, rank_mask)
    _carry_heads(searched, final)


def _structured(layer: LoraMoeLayer) -> bool:
    return any(plan.structured for plan in layer.molora_plan.values())


def _carry_layer(source: LoraMoeLayer, target: LoraMoeLayer, rank_mask: Tensor) -> None:
    adapter, other = target.active_adapters[0], source.active_adapters[0]
    layout, wide = target.molora_layout[adapter], source.molora_layout[other]
    assert isinstance(layout, ExpertLayout)
    assert isinstance(wide, ExpertLayout)
    starts = [0, *wide.ranks.cumsum(0).tolist()]
    rows = torch.cat([torch.arange(starts[e], starts[e] + r) for e, r in enumerate(layout.ranks.tolist())])
    rows = rows.to(rank_mask.device)
    factor = rank_mask[rows] * wide.spread.sum(0)[rows] / layout.spread.sum(0)
    target.molora_A[adapter].copy_(source.molora_A[other][rows])
    target.molora_B[adapter].copy_(source.molora_B[other][:, rows] * factor)
    if adapter in target.molora_router and other in source.molora_router:
        experts = layout.experts
        found = dict(source.molora_router[other].named_parameters())
        for name, parameter in target.molora_router[adapter].named_parameters():
            parameter.copy_(found[name][:experts])


def _carry_heads(searched: nn.Module, final: nn.Module) -> None:
    found = {n: p for n, p in searched.named_parameters() if p.requires_grad and ".molora_" not in n}
    for name, parameter in final.named_parameters():
        if name in found:
            parameter.copy_(found[name])
