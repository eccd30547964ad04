"""A frozen linear whose weight may be read, and the way that its gradient takes through two autograd nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from guilomo.layers.products import flat_rows


@dataclass
class Frozen:
    """A frozen linear whose product the nodes make themselves.

    Attributes:
        weight: ``(O, I)``; bias: ``(O,)`` or None; in the dtype of x and of the low-rank products.
    """

    weight: Tensor
    bias: Tensor | None
    _handed: tuple[int, Tensor] | None = field(default=None, repr=False)

    def product(self, x: Tensor, onto: Tensor) -> Tensor:
        """``x W^T + onto``, which is overwritten: ``(T, O)``, the bias already in it."""
        return onto.addmm_(flat_rows(x), self.weight.t()).view(*x.shape[:-1], len(self.weight))

    def hand_over(self, dy: Tensor) -> None:
        """Keeps ``dy (T, O)`` from the backward of `expand_frozen` for that of `shrink`."""
        self._handed = torch._C._current_graph_task_id(), dy

    def take(self) -> Tensor | None:
        """The dy of the backward now running. One of an earlier backward, which had no use for it, is thrown away."""
        handed, self._handed = self._handed, None
        return handed[1] if handed is not None and handed[0] == torch._C._current_graph_task_id() else None
