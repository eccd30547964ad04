"""Full experts as low-rank changes of a common feed-forward (FlexMoRE, arXiv 2602.08818; PHLoRA, arXiv 2509.10971).

    W_e = W_0 + B_e A_e        B_e A_e: the truncated SVD of W_e - W_0, for gate, up and down projection each

Nothing is trained. The mixture is a block of experts of a whole feed-forward (`guilomo.layers.feed_forward`): expert 0
is the common feed-forward itself and has no rank rows, the router is the sparse model's. With renormalised weights, as
in Mixtral, this is ours; FlexMoRE has the top-k of the softmax as it is. Which of its models renormalise is not known
here, FlexOlmo's optional bias of experts is left out, and no result of it was reproduced: experimental.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from guilomo.allocation import Allocation, ModulePlan
from guilomo.allocation.modules import IN, OUT, ROUTE
from guilomo.errors import GuilomoError, invalid
from guilomo.export import Factors
from guilomo.sparse_moe.read import SparseBlock, sparse_blocks
from guilomo.tuner import LoraMoeConfig, LoraMoeLayer

EFFECTIVE = "effective"
"""In place of a rank: the effective rank of each change."""
NEGLIGIBLE = 1e-3
"""Singular values below this share of the largest one do not count in an effective rank (FlexMoRE)."""

RankChoice = int | str
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_ROLES = (ROUTE, IN, OUT)


def effective_rank(singular_values: Tensor) -> int:
    """``ceil(exp(H))``, with H the entropy of the singular values ``(n,)`` over their sum; 0 where all are 0.

    Only values above 0.001 of the largest one are counted (FlexMoRE's mode of that name).
    """
    counted = singular_values[singular_values > NEGLIGIBLE * singular_values.max()].double()
    if not len(counted):
        return 0
    share = counted / counted.sum()
    # A flat spectrum of n values has exp(H) = n up to rounding, which must not become n + 1.
    return int(torch.ceil(torch.exp(-torch.special.xlogy(share, share).sum()) - 1e-9))


def balanced_factors(change: Tensor, rank: RankChoice) -> Factors:
    """The nearest ``b @ a`` of a rank to a change ``(O, I)`` in the Frobenius norm, ``U S V^T`` cut to `rank`.

    Both factors get the root of S, so that row j of a and column j of b have equal norms. The error is the root of the
    sum of the squared singular values left out. A rank above ``min(O, I)`` is that.

    Args:
        rank: a number of at least 0, or "effective": `effective_rank` of the singular values.

    Raises:
        GuilomoError: the rank is neither.
    """
    _check_rank(rank)
    wide = change.to(torch.promote_types(change.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    kept = effective_rank(s) if isinstance(rank, str) else min(rank, len(s))
    root = s[:kept].sqrt()
    return Factors(root[:, None] * vh[:kept], u[:, :kept] * root)


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
    changes: dict[str, list[Factors]] = {}
    modules: dict[str, ModulePlan] = {}
    for block in blocks.values():
        wanted = _ranks_of(block, ranks, base_expert)
        for linear, role, weights in zip(_LINEARS, _ROLES, (block.gate, block.up, block.down), strict=True):
            name = f"{block.name}.{linear}"
            base = _linear(dense, name, tuple(weights.shape[1:]))
            changes[name] = _changes(name, base, weights, wanted, base_expert)
            kept = tuple(pair.rank for pair in changes[name])
            out, into = weights.shape[1:]
            modules[name] = ModulePlan(into, out, kept, block.top_k, role=role, block=block.name)
    plan = Allocation(modules, scaling="constant", alpha=1.0, strategy="extracted from a sparse model")
    model = get_peft_model(dense, _config(plan, blocks))
    _fill(model, changes, blocks)
    return model


def _check_rank(rank: RankChoice) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0
    if not whole and rank != EFFECTIVE:
        raise invalid("rank", rank, f"a whole number of at least 0, or {EFFECTIVE!r}")


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
    return [balanced_factors(weight.to(base) - base, rank) for weight, rank in zip(weights, ranks, strict=True)]


def _check_rest(sparse: nn.Module, dense: nn.Module, blocks: Mapping[str, SparseBlock]) -> None:
    """What no adapter of the experts holds must be equal: activation, attention, norms, embeddings.

    Settings without weights, such as those of the rotary embedding, are not compared.
    """
    ours, theirs = (getattr(getattr(m, "config", None), "hidden_act", None) for m in (dense, sparse))
    if ours != theirs:
        raise invalid("hidden_act of the dense model", ours, f"{theirs!r}, that of the sparse one")
    inside = tuple(f"{name}." for name in blocks)
    there = {n: p for n, p in sparse.named_parameters() if not n.startswith(inside)}
    here = {n: p for n, p in dense.named_parameters() if not n.startswith(inside)}
    differing = sorted(there.keys() ^ here.keys())
    differing += [n for n in here if n in there and not torch.equal(here[n], there[n].to(here[n]))]
    if differing:
        raise GuilomoError(
            f"The dense and the sparse model differ in {differing[0]!r} ({len(differing)} in all), which the experts' "
            "adapter does not hold. Load the sparse model's own weights into the dense one, feed-forwards apart."
        )


def _config(plan: Allocation, blocks: Mapping[str, SparseBlock]) -> LoraMoeConfig:
    forms = {(block.top_k, block.renormalised) for block in blocks.values()}
    if len(forms) > 1:
        raise invalid("(top_k, renormalised) of the blocks", sorted(forms), "the same for all of them")
    top_k, renormalised = next(iter(forms))
    if renormalised and top_k == 1:
        raise invalid(
            "top_k of the sparse model", 1, "at least 2 where weights are renormalised", "It is then a constant."
        )
    options: dict[str, Any] = {"router": "topk" if renormalised else "topk_of_softmax", "balance_loss": None}
    return LoraMoeConfig(allocation=plan, feed_forward_experts=True, **options)  # type: ignore[arg-type]


@torch.no_grad()
def _fill(model: PeftModel, changes: Mapping[str, list[Factors]], blocks: Mapping[str, SparseBlock]) -> None:
    layers = {m.name: m for m in model.modules() if isinstance(m, LoraMoeLayer)}
    for name, pairs in changes.items():
        layers[name].molora_A["default"].copy_(torch.cat([pair.a for pair in pairs]))
        layers[name].molora_B["default"].copy_(torch.cat([pair.b for pair in pairs], dim=1))
    for block in blocks.values():
        router = layers[f"{block.name}.{_LINEARS[0]}"].molora_router["default"]
        router.get_parameter("weight").copy_(block.router)
