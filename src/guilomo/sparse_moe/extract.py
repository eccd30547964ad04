"""The experts of a sparse model as low-rank changes of the dense one's feed-forward (FlexMoRE, arXiv 2602.08818).

Nothing is trained. The mixture is a block of experts of a whole feed-forward (`guilomo.layers.feed_forward`): expert 0
is the common feed-forward itself and has no rank rows, the router is the sparse model's. With renormalised weights, as
in Mixtral, this is ours; FlexMoRE has the top-k of the softmax as it is. Which of its models renormalise is not known
here, FlexOlmo's optional bias of experts is left out, and no result of it was reproduced: experimental.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from guilomo.errors import GuilomoError, invalid
from guilomo.export import Factors
from guilomo.sparse_moe.extraction import Extraction
from guilomo.sparse_moe.factors import RankChoice, balanced_factors, change_of
from guilomo.sparse_moe.read import SparseBlock, sparse_blocks
from guilomo.sparse_moe.rest import differing, refuse_other_activation
from guilomo.tuner import LoraMoeLayer

_LINEARS = ("gate_proj", "up_proj", "down_proj")


def extracted_mixture(
    sparse: nn.Module, dense: nn.Module, ranks: RankChoice | Sequence[RankChoice], base_expert: int | None = 0
) -> PeftModel:
    """The dense model with an adapter that does what the sparse model does, up to the ranks.

    Args:
        sparse: a transformers model of experts in fused parameters, see `sparse_blocks`.
        dense: the model of the same architecture with one feed-forward per layer, whose other weights are those of
            `sparse`. It gets the adapter and is not changed otherwise.
        ranks: of the changes of all experts, or one for each expert, that of `base_expert` being 0; a number, or
            "effective".
        base_expert: the expert that is the feed-forward of `dense`; None: no expert is, and all are changes of it.

    Returns:
        The dense model with the adapter "default", which can be saved, loaded and trained on like any other.

    Raises:
        GuilomoError: the models do not belong together, a block cannot be read, or a rank cannot be used.
    """
    blocks = sparse_blocks(sparse)
    _check_rest(sparse, dense, blocks)
    top_k, router = _routing(blocks)
    changes: dict[str, list[Factors]] = {}
    for block in blocks.values():
        wanted = _ranks_of(block, ranks, base_expert)
        for linear, weights in zip(_LINEARS, (block.gate, block.up, block.down), strict=True):
            name = f"{block.name}.{linear}"
            base = _linear(dense, name, tuple(weights.shape[1:]))
            changes[name] = _changes(name, base, weights, wanted, base_expert)
    members = {name: [f"{name}.{linear}" for linear in _LINEARS] for name in blocks}
    model = Extraction.of(changes, members, top_k, "extracted from a sparse model").attach(dense, router=router)
    _fill_routers(model, blocks)
    return model


def _ranks_of(block: SparseBlock, ranks: RankChoice | Sequence[RankChoice], base: int | None) -> list[RankChoice]:
    if base is not None and not 0 <= base < block.experts:
        raise invalid("base_expert", base, f"one of the {block.experts} experts, counted from 0, or None")
    if isinstance(ranks, (int, str)):
        return [0 if expert == base else ranks for expert in range(block.experts)]
    if len(ranks) != block.experts or (base is not None and ranks[base] != 0):
        where = "" if base is None else f", 0 for expert {base}, which is the dense feed-forward"
        raise invalid("ranks", list(ranks), f"one rank for each of the {block.experts} experts{where}")
    return list(ranks)


def _linear(dense: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        weight = dense.get_parameter(f"{name}.weight")
    except AttributeError:
        raise GuilomoError(
            f"The dense model has no linear {name!r}, where the sparse one has experts. Give the dense model of the "
            "same architecture (Olmo2 for FlexOlmo, Mistral for Mixtral)."
        ) from None
    if tuple(weight.shape) != shape:
        raise invalid(f"shape of {name}", tuple(weight.shape), f"{shape}, that of the sparse model's experts")
    return weight.detach()


def _changes(
    name: str, base: Tensor, weights: Tensor, ranks: Sequence[RankChoice], base_expert: int | None
) -> list[Factors]:
    if base_expert is not None and not torch.equal(weights[base_expert].to(base), base):
        raise GuilomoError(
            f"Expert {base_expert} of the sparse model is not the dense model's {name!r}. Give base_expert the expert "
            "that is, or None to take every expert as a change of the dense feed-forward."
        )
    return [balanced_factors(change_of(weight, base), rank) for weight, rank in zip(weights, ranks, strict=True)]


def _check_rest(sparse: nn.Module, dense: nn.Module, blocks: Mapping[str, SparseBlock]) -> None:
    """What no adapter of the experts holds must be equal: activation, attention, norms, embeddings."""
    refuse_other_activation(dense, sparse, "the sparse one")
    inside = tuple(f"{name}." for name in blocks)
    there = {n: p for n, p in sparse.named_parameters() if not n.startswith(inside)}
    here = {n: p for n, p in dense.named_parameters() if not n.startswith(inside)}
    if found := differing(here, there):
        raise GuilomoError(
            f"The dense and the sparse model differ in {found[0]!r} ({len(found)} in all), which the experts' "
            "adapter does not hold. Load the sparse model's own weights into the dense one, feed-forwards apart."
        )


def _routing(blocks: Mapping[str, SparseBlock]) -> tuple[int, str]:
    """K, and the router that weighs as the sparse model's does."""
    forms = {(block.top_k, block.renormalised) for block in blocks.values()}
    if len(forms) > 1:
        raise invalid("(top_k, renormalised) of the blocks", sorted(forms), "the same for all of them")
    top_k, renormalised = next(iter(forms))
    if renormalised and top_k == 1:
        raise invalid(
            "top_k of the sparse model", 1, "at least 2 where weights are renormalised", "It is then a constant."
        )
    return top_k, "topk" if renormalised else "topk_of_softmax"


@torch.no_grad()
def _fill_routers(model: PeftModel, blocks: Mapping[str, SparseBlock]) -> None:
    layers = {m.name: m for m in model.modules() if isinstance(m, LoraMoeLayer)}
    for block in blocks.values():
        router = layers[f"{block.name}.{_LINEARS[0]}"].molora_router["default"]
        router.get_parameter("weight").copy_(block.router)
