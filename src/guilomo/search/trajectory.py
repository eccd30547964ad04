"""What is recorded along a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from guilomo.search.vectors import SelectionVectors

TENSORS = ("experts", "ranks", "expert_vectors", "rank_vectors")


@dataclass
class Trajectory:
    """Records along the search, and what follows from them.

    Attributes:
        step, train_loss, held_out_loss, expected_parameters: one number per record.
        experts: per record the expected counts ``(M,)``; ranks: per record the expected ranks ``(M, E)``.
        expert_vectors, rank_vectors: per record the selection vectors themselves.
    """

    step: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    held_out_loss: list[float | None] = field(default_factory=list)
    expected_parameters: list[float] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    ranks: list[Tensor] = field(default_factory=list)
    expert_vectors: list[Tensor] = field(default_factory=list)
    rank_vectors: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def record(self, step: int, train_loss: float, held_out_loss: float | None, vectors: SelectionVectors) -> None:
        experts, ranks = vectors.expected()
        self.step.append(step)
        self.train_loss.append(train_loss)
        self.held_out_loss.append(held_out_loss)
        self.expected_parameters.append(float(vectors.expected_parameters()))
        self.experts.append(experts.detach().cpu().clone())
        self.ranks.append(ranks.detach().cpu().clone())
        self.expert_vectors.append(vectors.experts.detach().cpu().clone())
        self.rank_vectors.append(vectors.ranks.detach().cpu().clone())

    def to_dict(self, names: list[str]) -> dict[str, Any]:
        """JSON-ready, by module; ranks are the mean over the experts expected to remain."""
        experts = torch.stack(self.experts) if self.experts else torch.zeros(0, len(names))
        ranks = [_kept_mean(e, r) for e, r in zip(self.experts, self.ranks, strict=True)]
        mean_ranks = torch.stack(ranks) if ranks else torch.zeros(0, len(names))
        return {
            "step": self.step,
            "train_loss": self.train_loss,
            "held_out_loss": self.held_out_loss,
            "expected_parameters": self.expected_parameters,
            "experts": {n: [round(v, 4) for v in experts[:, m].tolist()] for m, n in enumerate(names)},
            "ranks": {n: [round(v, 4) for v in mean_ranks[:, m].tolist()] for m, n in enumerate(names)},
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensor records, stacked over the S records: ``(S, M)``, ``(S, M, E)`` and the vectors' own shapes."""
        return {name: torch.stack(getattr(self, name)) for name in TENSORS if self.step}

    def numbers(self) -> dict[str, Any]:
        """The scalar records, JSON-ready."""
        return {k: getattr(self, k) for k in ("step", "train_loss", "held_out_loss", "expected_parameters")}

    @classmethod
    def restored(cls, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> Trajectory:
        """Back from `numbers` and `tensors`."""
        out = cls(**numbers)
        for name, value in tensors.items():
            setattr(out, name, list(value.unbind(0)))
        return out


def _kept_mean(experts: Tensor, ranks: Tensor) -> Tensor:
    """Mean rank ``(M,)`` over the first `experts` experts of each module, fractions counted as such."""
    place = torch.arange(ranks.shape[1])
    kept = (experts[:, None] - place).clamp(0, 1)
    return (kept * ranks).sum(1) / kept.sum(1).clamp_min(1e-9)
