"""What an adapter of the experts does not hold must be the same in the models that they come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from guilomo.errors import invalid


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Names of weights that only one has, then of those that are not equal in the dtype of ours."""
    shared = [name for name in ours if name in theirs]
    return sorted(ours.keys() ^ theirs.keys()) + [n for n in shared if not _equal(ours[n], theirs[n])]


def refuse_other_activation(ours: nn.Module, theirs: nn.Module, who: str) -> None:
    """Other settings without weights, such as those of the rotary embedding, are not compared.

    Raises:
        GuilomoError: the configurations name other activations.
    """
    for field in ("hidden_act", "activation_function"):
        own, other = (getattr(getattr(model, "config", None), field, None) for model in (ours, theirs))
        if own != other:
            raise invalid(f"{field} of the dense model", own, f"{other!r}, that of {who}")


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours, theirs.to(ours))
