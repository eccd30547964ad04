"""Models fine-tuned from one base as the experts of its feed-forwards (FlexMoRE, arXiv 2602.08818).

Every expert was trained on data of its own from the same public model, the weights of its feed-forwards' linears alone,
as in FlexOlmo. Expert 0 is the base's own feed-forward and has no rank rows; expert e is W_0 plus the truncated SVD of
what its training changed.

Of the paper is the extraction. That the router is new and trained on the task, where FlexMoRE takes over rows of
routers that were trained with each expert, is ours. So is the default, weights that are renormalised. The paper's,
router `topk_of_softmax`, sum to less than 1 and shrink the frozen feed-forward as long as the router is unsure: one
that has learned nothing gives 2 of 4 experts half of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.export import Factors
from guilomo.sparse_moe.base import Base
from guilomo.sparse_moe.extraction import Extraction
from guilomo.sparse_moe.factors import RankChoice, balanced_factors, check_rank
from guilomo.sparse_moe.folders import BASE, Model, Models, loaded, named_models
from guilomo.tuner.decided import DECIDED_BY_EXPERTS, refuse_decided

Ranks = RankChoice | Sequence[RankChoice] | Mapping[str, RankChoice]
"""A number or "effective" for all experts, or one for each of them, in their order or by name."""

FOLLOW_FROM_MODELS = DECIDED_BY_EXPERTS | {"feed_forward_experts"}
"""Fields of `LoraMoeConfig` that follow from the models."""


def mixture_of_models(
    model: nn.Module,
    experts: Models,
    ranks: Ranks,
    *,
    top_k: int = 2,
    router: str = "topk",
    train: str = "router",
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """The base model with the fine-tuned ones as low-rank experts of its feed-forwards.

    With all weight on expert e the model computes what model e computes, up to what the rank leaves out; with all
    weight on expert 0 it is the base model. The routers are new and have to be trained; until then they choose at
    random.

    Args:
        model: the base model of all experts.
        experts: models whose other weights are the base's; heads of classifiers are not looked at. Folders are loaded
            one at a time, in the dtype of the base.
        ranks: of the experts' changes. A linear that an expert leaves as it is has rank 0, and a feed-forward that none
            of them changes gets no router.
        top_k: experts that a token uses, the base among them; at most their number is used.
        router: as in `LoraMoeConfig`.
        train: "router": the experts stay as they were extracted; or "all".
        adapter_name: PEFT's name of the mixture.
        **options: other fields of `LoraMoeConfig`. There is no balance loss unless one is asked for.

    Raises:
        GuilomoError: see `extraction_of_models`; options that the experts decide, or that are unknown.
    """
    refuse_decided(options, FOLLOW_FROM_MODELS, "the experts")
    blocks = options.get("feed_forward_blocks")
    extraction = extraction_of_models(model, experts, ranks, top_k=top_k, feed_forward_blocks=blocks)
    return extraction.attach(model, adapter_name, **options, top_k=top_k, router=router, train=train)


def extraction_of_models(
    model: nn.Module,
    experts: Models,
    ranks: Ranks,
    *,
    top_k: int = 2,
    feed_forward_blocks: Sequence[Sequence[str]] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, all_, name: None,
) -> Extraction:
    """The experts of `mixture_of_models`, which can be saved, and attached more than once.

    Never more than one expert is held in full.

    Args:
        feed_forward_blocks: as in `LoraMoeConfig`. progress: called with (experts done, experts, name).

    Raises:
        GuilomoError: no experts, or names that are equal; a rank that cannot be used; a model that cannot be loaded, or
            differs from the base in another weight than those of its feed-forwards; or none that changes anything.
    """
    if isinstance(model, PeftModel):
        raise invalid("model", type(model).__name__, "the base model", "Pass model.unload(), or load the base anew.")
    if not isinstance(top_k, int) or top_k < 1:
        raise invalid("top_k", top_k, "a whole number of at least 1")
    named = named_models(experts)
    wanted = ranks_by_name(ranks, list(named))
    base = Base(model, feed_forward_blocks)
    changes = {linear: [balanced_factors(weight, 0)] for linear, weight in base.weights.items()}
    for done, (name, expert) in enumerate(named.items(), start=1):
        for linear, pair in _factors(base, expert, name, wanted[name]).items():
            changes[linear].append(pair)
        progress(done, len(named), name)
    changed = {
        block: linears
        for block, linears in base.blocks.items()
        if any(pair.rank for linear in linears for pair in changes[linear])
    }
    if not changed:
        raise GuilomoError(
            f"None of the experts changes a feed-forward of the base model at the ranks {wanted}, so there is nothing "
            "to choose among. Give models that were trained, and ranks above 0."
        )
    return Extraction.of(changes, changed, top_k, "extracted from full experts", [BASE, *named])


def ranks_by_name(ranks: Ranks, names: Sequence[str]) -> dict[str, RankChoice]:
    """The rank of every expert.

    Raises:
        GuilomoError: there is not one for each, or one is neither a whole number of at least 0 nor "effective".
    """
    if isinstance(ranks, Mapping):
        for name in ranks.keys() - set(names):
            raise unknown("expert in ranks", str(name), names)
        found = dict(ranks)
    elif isinstance(ranks, Sequence) and not isinstance(ranks, str):
        found = dict(zip(names, ranks, strict=False)) if len(ranks) == len(names) else {}
    else:
        found = dict.fromkeys(names, ranks)
    if len(found) < len(names):
        raise invalid("ranks", ranks, f"one rank for all experts, or one for each of {', '.join(names)}")
    for rank in found.values():
        check_rank(rank)
    return {name: found[name] for name in names}


def _factors(base: Base, expert: Model, name: str, rank: RankChoice) -> dict[str, Factors]:
    """The pairs of one expert by linear; all else of it is let go."""
    model, missing = (expert, set[str]()) if isinstance(expert, nn.Module) else loaded(Path(expert), name, base.model)
    base.refuse_other(model, name, missing)
    return {linear: balanced_factors(change, rank) for linear, change in base.changes(model, name, missing)}
