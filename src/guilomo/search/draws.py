"""Counts drawn from the preferences, row by row, and what the losses of the rows say about them (ours).

A soft mask can be undone: weights grow until a component that is half on contributes as if it were whole, and at that
point the loss no longer depends on the mask. So every row draws its counts anew and what is not drawn is off.

Ranks learn by the gradient of their masks, taken straight through the draw, and so does whether a module is adapted at
all. Between on and off the loss is nearly quadratic, and slopes taken at both ends give the difference. How many
experts a module has, given that it has any, cannot be learned so: behind a router the slope says almost nothing about
what one more expert is worth. Such counts learn from losses. Every held-out row is seen under two independent draws,
and with ``s`` the gradient of the log-probability of a draw

    d E[L] / d g  =  E[ (L_1 - L_2) (s_1 - s_2) ] / 2

which is the score-function estimator with the other draw as its baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guilomo.search import relaxation as relax
from guilomo.search.distributed import rank, totals, world
from guilomo.search.vectors import SelectionVectors
from guilomo.tuner import SelectionMasks


class Rows(IntEnum):
    """Groups of rows in a step; each has draws of its own."""

    TRAIN = 0
    HELD_OUT = 1
    HELD_OUT_AGAIN = 2
    TRAIN_AGAIN = 3


TRAINING = (Rows.TRAIN, Rows.TRAIN_AGAIN)
HOLDING_OUT = (Rows.HELD_OUT, Rows.HELD_OUT_AGAIN)


@dataclass
class Shown:
    """The masks of one batch.

    Attributes:
        masks: by module; empty: everything is on.
        log_chance: ``(B,)`` log-probability of the expert counts each row drew behind routers, given which modules are
            on; None where no such count is open.
    """

    masks: dict[str, SelectionMasks]
    log_chance: Tensor | None = None

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """``()`` zero, whose gradient is that of the mean loss through the draws of expert counts.

        Args:
            sums, counts: ``(2 B,)`` summed loss and scored labels of B rows under one draw and under another; they are
                the last rows of the batch.
        """
        if self.log_chance is None:
            return sums.new_zeros(())
        losses = sums.unflatten(0, (2, -1))
        chances = self.log_chance[-len(sums) :].unflatten(0, (2, -1))
        gain, lead = losses[0] - losses[1], chances[0] - chances[1]
        (count,) = totals([counts.sum()])
        # The second factor is exactly 0. The losses stay attached, because second derivatives go through them.
        value: Tensor = (gain * (lead - lead.detach())).sum() / count.clamp_min(1)
        return value


def show(vectors: SelectionVectors, step: int, groups: Sequence[tuple[Rows, int]], learn_from: int = 0) -> Shown:
    """The masks of a batch made of `groups`, given as (kind, rows of this process); a function of seed and step.

    All passes of a step, all processes and a resumed search see the same draws. Masks of groups before the
    `learn_from`-th are constants. Without sampling all rows have the masks of `SelectionVectors.masks`.
    """
    if not vectors.sampled:
        return Shown(vectors.masks(detach=learn_from >= len(groups)))
    experts, ranks = vectors.survival_masks()
    levels = torch.cat([_levels(vectors, step, kind, rows) for kind, rows in groups]).to(experts)
    learns = torch.cat([torch.full((rows,), i >= learn_from) for i, (_, rows) in enumerate(groups)])
    on, kept = _counts(experts, levels[..., :1])
    shown = _through(ranks > levels[..., 1:, None], ranks, learns)  # (B, M, E, R)
    if vectors.least_experts == 0:
        shown = shown * _through(on, experts[:, :1], learns)[..., None]
    offsets = torch.where(kept, 0.0, relax.EXPERT_BLOCK).to(experts)
    parts = zip(vectors.names, offsets.unbind(1), shown.flatten(2).unbind(1), strict=True)
    masks = {name: SelectionMasks(None if e.shape[-1] == 1 else e, r) for name, e, r in parts}
    return Shown(masks, _log_chance(vectors, kept, on) if vectors.pairs else None)


def _through(drawn: Tensor, chance: Tensor, learns: Tensor) -> Tensor:
    """The draw ``(B, ...)`` as numbers, with the gradient of its `chance` ``(...)`` in the rows ``(B,)`` that learn."""
    if not learns.any():
        return drawn.to(chance)
    slope = chance - chance.detach()  # exactly 0
    return drawn.to(chance) + learns.to(chance).view(-1, *[1] * chance.dim()) * slope


@torch.no_grad()
def _counts(experts: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Draws which modules are on, and for all of them how many experts they have if they are.

    A module that is off has a count too, because the slope there asks what the module would do with it.

    Args:
        experts: survival masks ``(M, E)``. levels: ``(B, M, 1)`` uniform numbers.

    Returns:
        ``(B, M, 1)`` which modules are on; ``(B, M, E)`` the experts each has.
    """
    stays = experts[:, :1]
    on = stays > levels
    # What is left of a level after this decision is uniform again, and decides the count.
    left = torch.where(on, levels / stays.clamp_min(1e-12), (levels - stays) / (1 - stays).clamp_min(1e-12))
    kept = experts / stays.clamp_min(1e-12) > left
    kept[..., 0] = True
    return on, kept


def _levels(vectors: SelectionVectors, step: int, kind: Rows, rows: int) -> Tensor:
    """``(rows, M, 1 + E)`` uniform numbers: what is likelier than its level is kept."""
    m, e = vectors.ranks.shape[:2]
    generator = np.random.default_rng([vectors.config.seed, step, int(kind)])
    # Drawn for the rows of all processes, so that a row has the same draw wherever it is.
    levels = generator.random((rows * world(), m, 1 + e), dtype=np.float32)[rank() :: world()]
    return torch.from_numpy(np.ascontiguousarray(levels))


def _log_chance(vectors: SelectionVectors, kept: Tensor, on: Tensor) -> Tensor:
    """``(B,)`` log-probability of the counts of the modules that are on; draws as returned by `_counts`.

    Its graph is its own: the backward of the masks comes after that of the losses (see `split_pass.leaves_of`).
    """
    experts, _ = vectors.survival_masks()
    given = experts / experts[:, :1].clamp_min(1e-12)
    chance = -F.pad(given, (0, 1)).diff(dim=-1)  # (M, E), of counts 1..E
    logs = chance.clamp_min(1e-12).log().expand(len(kept), -1, -1)
    drawn = kept.sum(-1, keepdim=True) - 1
    return (logs.gather(-1, drawn) * on).squeeze(-1).sum(-1)
