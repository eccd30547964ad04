"""Plans written by hand as rules on module names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from typing_extensions import Unpack

from guilomo.allocation.budget import fit
from guilomo.allocation.layerwise import Shapes, Shared, check_explicit, layer_count
from guilomo.allocation.modules import positive_int
from guilomo.allocation.names import site
from guilomo.allocation.plan import Allocation
from guilomo.allocation.preference import Preference
from guilomo.errors import GuilomoError, invalid, unknown

Rule = Mapping[str, Any] | int | Sequence[int] | None
"""Experts and ranks of the modules a pattern matches; see `rules`."""

KEYS = ("experts", "rank", "ranks", "top_k")


class Choice(NamedTuple):
    """A rule read: the rank of each expert (none: not adapted) and top_k, None if the rule does not say."""

    ranks: tuple[int, ...]
    top_k: int | None


def rules(
    shapes: Shapes,
    rules: Mapping[str, Rule],
    default: Rule = None,
    *,
    experts: int = 4,
    rank: int = 8,
    top_k: int = 2,
    top_k_floor: bool = False,
    budget: int | Allocation | None = None,
    **shared: Unpack[Shared],
) -> Allocation:
    """Experts and ranks by name patterns; the first pattern that matches a module decides.

    A pattern is a regular expression for the end of the dotted name, from a dot on: `query`, `mlp.down_proj` or
    `layers.[0-9].self_attn.(q|v)_proj` (PEFT's convention for target modules). A rule is one of

    * an integer: that many experts of rank `rank`; 0 or None: not adapted;
    * a list: the rank of each expert;
    * a dict with `experts` and `rank`, or `ranks`, and perhaps `top_k`.

    A budget scales the ranks. Source: ours.

    Args:
        shapes: module -> (I, O).
        rules: pattern -> rule.
        default: rule for modules that no pattern matches.
        experts, rank: what rules that leave them out mean.
        top_k: of modules whose rule gives none; a module with fewer experts uses all of them,
        top_k_floor: or is an error, if this is True.
        budget, shared: see `fit`.

    Raises:
        GuilomoError: a pattern that matches nothing (the nearest module is named), or a rule that cannot be read.
    """
    layer_count(shapes)
    fallback = Choice((positive_int("rank", rank),) * positive_int("experts", experts), None)
    chosen = _choices(shapes, rules, default, fallback)
    if top_k_floor:
        check_explicit("experts", [len(choice.ranks) for choice in chosen.values()], {"top_k": top_k})
    return fit(
        Preference(
            {name: float(len(choice.ranks)) for name, choice in chosen.items()},
            {name: choice.ranks for name, choice in chosen.items()},
        ),
        shapes,
        top_k={name: choice.top_k or positive_int("top_k", top_k) for name, choice in chosen.items()},
        top_k_floor=False,
        budget=budget,
        strategy="rules",
        **shared,
    )


def _choices(shapes: Shapes, rules: Mapping[str, Rule], default: Rule, fallback: Choice) -> dict[str, Choice]:
    """The choice for every module: from the first rule that matches it, else the default."""
    chosen: dict[str, Choice] = {}
    for pattern, rule in rules.items():
        choice = _read(f"rule {pattern!r}", rule, fallback)
        for name in _matches(pattern, shapes):
            chosen.setdefault(name, choice)
    rest = _read("default", default, fallback)
    return {name: chosen.get(name, rest) for name in shapes}


def _matches(pattern: str, shapes: Shapes) -> list[str]:
    """The modules whose name ends in the pattern."""
    try:
        expression = re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise invalid("pattern", pattern, f"a regular expression ({error})") from None
    found = [name for name in shapes if expression.fullmatch(name)]
    if not found:
        suffixes = sorted({site(name)[1] for name in shapes} | {name.rpartition(".")[2] for name in shapes})
        near = get_close_matches(pattern, suffixes, n=1, cutoff=0.0)
        raise invalid("pattern", pattern, "the end of some module's name", f"The nearest is {near[0]!r}.")
    return found


def _read(field: str, rule: Rule, fallback: Choice) -> Choice:
    """The choice a rule stands for; GuilomoError names the rule."""
    try:
        return _choice(rule, fallback)
    except GuilomoError as error:
        raise GuilomoError(f"{field}: {error}") from None


def _choice(rule: Rule, fallback: Choice) -> Choice:
    if rule is None:
        return Choice((), None)
    if isinstance(rule, Mapping):
        return _from_mapping(rule, fallback)
    if isinstance(rule, Sequence) and not isinstance(rule, str):
        return Choice(_ranks(rule), None)
    return Choice(fallback.ranks[:1] * _count(rule), None)


def _from_mapping(rule: Mapping[str, Any], fallback: Choice) -> Choice:
    """A dict rule; `ranks` already says how many experts there are and of which rank."""
    for key in rule:
        if key not in KEYS:
            raise unknown("key", str(key), KEYS)
    if "ranks" in rule and len(rule.keys() & {"experts", "rank"}) > 0:
        raise invalid("rule", dict(rule), "either ranks, or experts and rank", "Remove one of them.")
    if "ranks" in rule:
        ranks = _ranks(rule["ranks"])
    else:
        rank = positive_int("rank", rule.get("rank", fallback.ranks[0]))
        ranks = (rank,) * _count(rule.get("experts", len(fallback.ranks)))
    top_k = positive_int("top_k", rule["top_k"]) if "top_k" in rule else None
    if top_k is not None and 0 < len(ranks) < top_k:
        raise invalid("top_k", top_k, f"at most the expert count, {len(ranks)}", "Lower it or add experts.")
    return Choice(ranks, top_k)


def _ranks(value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise invalid("ranks", value, "a list with one rank per expert")
    return tuple(positive_int("rank", rank) for rank in value)


def _count(value: Any) -> int:
    """An expert count; 0 and None mean not adapted."""
    return 0 if value is None or (value == 0 and not isinstance(value, bool)) else positive_int("experts", value)
