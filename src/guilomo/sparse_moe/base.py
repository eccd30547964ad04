"""The base model of full experts: the linears that they may change, and what they must share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from guilomo.allocation import FEED_FORWARDS, find_blocks
from guilomo.errors import GuilomoError, invalid
from guilomo.sparse_moe.factors import change_of
from guilomo.sparse_moe.rest import differing, refuse_other_activation
from guilomo.tuner import adaptable_modules


def feed_forwards(model: nn.Module, patterns: Sequence[Sequence[str]] | None = None) -> dict[str, tuple[str, ...]]:
    """The feed-forwards of a model by dotted path: the names of their linears in the order of running.

    Args:
        patterns: names of a feed-forward's linears in the order of running; unset: `FEED_FORWARDS`.

    Raises:
        GuilomoError: there are none.
    """
    found = find_blocks(adaptable_modules(model), patterns or FEED_FORWARDS)
    if not found:
        raise invalid(
            "feed_forward_blocks",
            patterns,
            f"names of a feed-forward's linears in the order of running, as {type(model).__name__} has them",
        )
    return found


class Base:
    """A model that experts were trained from.

    Attributes:
        blocks: its feed-forwards, see `feed_forwards`. weights: of their linears, ``(O, I)``.

    Raises:
        GuilomoError: there are none, or one whose weight is not stored as numbers, such as a quantised one.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[Sequence[str]] | None = None) -> None:
        self.model, self.blocks = model, feed_forwards(model, patterns)
        stored = model.state_dict()
        names = [linear for linears in self.blocks.values() for linear in linears]
        self.weights = {name: self._weight(name, stored) for name in names}
        self._rest = self._without_linears(stored)

    def refuse_other(self, expert: nn.Module, name: str, missing: set[str]) -> None:
        """Refuses an expert that differs in anything but the weights of these linears and the head of a classifier.

        Args:
            missing: weights that the expert has only because they were drawn at random.

        Raises:
            GuilomoError: names the expert and the first weight that differs.
        """
        refuse_other_activation(self.model, expert, f"expert {name!r}")
        here, there = (
            {key: weight for key, weight in weights.items() if key not in missing}
            for weights in (self._rest, self._without_linears(expert.state_dict()))
        )
        if found := differing(here, there):
            raise GuilomoError(
                f"Expert {name!r} differs from the base model in {found[0]!r} ({len(found)} in all), which is not the "
                "weight of a feed-forward's linear. Experts share everything else: train them from this very base, and "
                "those weights alone (docs/structures.md shows how)."
            )

    def changes(self, expert: nn.Module, name: str, missing: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Every linear with what the expert's training changed in it, ``(O, I)``; made one at a time.

        Raises:
            GuilomoError: the expert lacks a linear, or has one of another shape.
        """
        stored = {key: weight for key, weight in expert.state_dict().items() if key not in missing}
        for linear, weight in self.weights.items():
            theirs = stored.get(f"{linear}.weight")
            turned = None if theirs is None else self._turned(linear, theirs)
            if turned is None or turned.shape != weight.shape:
                found = None if turned is None else tuple(turned.shape)
                allowed = f"{tuple(weight.shape)}, that of the base model"
                raise invalid(f"expert {name!r}: (out, in) of {linear!r}", found, allowed)
            yield linear, change_of(turned, weight)

    def _weight(self, linear: str, stored: Mapping[str, Tensor]) -> Tensor:
        weight = stored.get(f"{linear}.weight")
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            raise GuilomoError(
                f"The base model's {linear!r} is a {type(self.model.get_submodule(linear)).__name__}, whose weight "
                "cannot be subtracted from an expert's. Load the base model unquantised; its adapter serves both."
            )
        return self._turned(linear, weight)

    def _turned(self, linear: str, weight: Tensor) -> Tensor:
        """A stored weight as ``(O, I)``."""
        return weight.T if isinstance(self.model.get_submodule(linear), Conv1D) else weight

    def _without_linears(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What experts share with the base."""
        own = {f"{linear}.weight" for linear in self.weights}
        return {n: w for n, w in stored.items() if n not in own and n.split(".")[0] not in SEQ_CLS_HEAD_NAMES}
