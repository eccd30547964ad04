"""Feed-forward blocks: linears that belong together because their experts are weighted behind the nonlinearity.

A block is known by the names of its linears below one common prefix, in the order in which they run. The first one
reads x and routes; those between it and the last read x too; the last one sums what the chosen experts made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from guilomo.allocation.modules import IN, OUT, ROUTE, ModulePlan
from guilomo.errors import GuilomoError, invalid

FEED_FORWARDS: tuple[tuple[str, ...], ...] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("intermediate.dense", "output.dense"),
    ("c_fc", "c_proj"),
    ("fc1", "fc2"),
    ("lin1", "lin2"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
"""Names of the linears of known feed-forwards in the order of running; the first line that fits a prefix counts."""


def find_blocks(
    names: Collection[str], patterns: Iterable[Sequence[str]] = FEED_FORWARDS
) -> dict[str, tuple[str, ...]]:
    """The feed-forward blocks among the linears of a model: prefix -> full names in the order of running.

    A prefix P is a block where ``P.a``, ``P.b``, ... exist for all names of one pattern (ours).
    """
    known, found = set(names), {}
    for pattern in patterns:
        for name in names:
            prefix = name.removesuffix(f".{pattern[-1]}")
            members = tuple(f"{prefix}.{part}" for part in pattern)
            if prefix != name and prefix not in found and known.issuperset(members):
                found[prefix] = members
    return found


def roles_of(members: Sequence[str]) -> dict[str, str]:
    """The role of every linear of a block, which come in the order of running."""
    return dict(zip(members, (ROUTE, *[IN] * (len(members) - 2), OUT), strict=True))


def with_roles(modules: Mapping[str, ModulePlan], blocks: Mapping[str, Sequence[str]]) -> dict[str, ModulePlan]:
    """The plans with their roles in the blocks. Blocks without experts, or with one, are left plain.

    Raises:
        GuilomoError: a block is adapted in part, or no block is adapted at all.
    """
    planned, any_adapted = dict(modules), False
    for block, members in blocks.items():
        adapted = [name for name in members if name in modules and modules[name].adapted]
        if not adapted:
            continue
        any_adapted = True
        if len(adapted) < len(members):
            left_out = sorted(set(members) - set(adapted))
            raise GuilomoError(
                f"The feed-forward block {block!r} is adapted in part: its experts need all of its linears, but "
                f"{', '.join(left_out)} have none. Target them too, or none of the block."
            )
        if all(modules[name].experts == 1 for name in members):
            continue
        for name, role in roles_of(members).items():
            planned[name] = replace(modules[name], role=role, block=block)
    if not any_adapted:
        raise invalid(
            "feed_forward_experts",
            True,
            "False, for no adapted module lies in a feed-forward block",
            "Target the linears of the feed-forwards, and name them in feed_forward_blocks if the model calls them "
            "otherwise.",
        )
    return planned


def check_blocks(modules: Mapping[str, ModulePlan]) -> None:
    """Refuses blocks that cannot run.

    Raises:
        GuilomoError: a block lacks the module that routes or the one that sums, has two of them, or modules with other
            numbers of experts or another top-k.
    """
    blocks: dict[str, list[ModulePlan]] = {}
    for module in modules.values():
        if module.role:
            blocks.setdefault(module.block, []).append(module)
    for block, members in blocks.items():
        for role in (ROUTE, OUT):
            count = sum(member.role == role for member in members)
            if count != 1:
                raise invalid(f"modules with role {role!r} in block {block!r}", count, "exactly one")
        shapes = {(member.experts, member.top_k) for member in members}
        if len(shapes) > 1:
            raise invalid(
                f"(experts, top_k) of the modules of block {block!r}", sorted(shapes), "the same for all of them"
            )
