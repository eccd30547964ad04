"""A linear of a feed-forward block: it stacks the outputs of the chosen experts, or sums them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from guilomo.allocation.modules import OUT, ROUTE
from guilomo.errors import GuilomoError
from guilomo.layers.feed_forward import Slots, beyond_one, stacked_outputs, summed_delta, weighted_sum
from guilomo.tuner.forward import with_router_losses
from guilomo.tuner.layer import LoraMoeLayer


class FeedForwardLayer(LoraMoeLayer):
    """One linear of a feed-forward whose experts are weighted behind its nonlinearity.

    The computation is in `guilomo.layers.feed_forward`.

    The module of role "route" has the block's router and tells the others of the block, through the context, which
    experts each token visits. Parameters are those of `LoraMoeLayer`. One adapter is active at a time; nothing merges.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [adapter for adapter in self.active_adapters if adapter in self.molora_A]
        if self.disable_adapters or not active:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        if len(active) > 1:
            raise GuilomoError(
                f"Module {self.name!r} has {len(active)} active adapters ({', '.join(active)}), but experts of whole "
                "feed-forwards do not add up. Activate one of them with set_adapter."
            )
        adapter = active[0]
        if self.molora_plan[adapter].role == OUT:
            return self._summed(x, adapter)
        return self._stacked(x, adapter)

    def _stacked(self, x: Tensor, adapter: str) -> Tensor:
        """``(N, ..., I)`` to ``(K N, ..., O)``."""
        routing = None
        if self.molora_plan[adapter].role == ROUTE:
            routing = self.routing(x, adapter)
            assert routing is not None
            self.context.slots[self._key(adapter)] = Slots.of(routing)
        slots = self._slots(adapter)
        h = self._rank_activations(x, adapter)
        y = stacked_outputs(self.base_layer(x), h, slots, self.mixtures[adapter].layout.spread, self.molora_B[adapter])
        return y if routing is None else with_router_losses(self.mixtures[adapter], y, x, routing)

    def _summed(self, x: Tensor, adapter: str) -> Tensor:
        """``(K N, ..., I)`` to ``(N, ..., O)``."""
        slots = self._slots(adapter)
        del self.context.slots[self._key(adapter)]
        rows = slots.experts.shape[1]
        if x.shape[0] != len(slots) * rows:
            raise GuilomoError(
                f"Module {self.name!r} met an input of shape {tuple(x.shape)}, but {len(slots)} chosen experts of "
                f"{rows} rows were stacked in front: something between the linears of this feed-forward is not "
                "elementwise. Leave feed_forward_experts out for this model."
            )
        each = x.unflatten(0, (len(slots), rows))
        y: Tensor = self.base_layer(weighted_sum(each, slots))
        bias = self._bias()
        if bias is not None:
            y = y + (beyond_one(slots).unsqueeze(-1) * bias).to(y.dtype)
        h = self._rank_activations(each, adapter)
        delta = summed_delta(h, slots, self.mixtures[adapter].layout.spread, self.molora_B[adapter])
        return y + delta.to(y.dtype)

    def _rank_activations(self, x: Tensor, adapter: str) -> Tensor:
        """``(..., I) -> (..., R)``, dropout included."""
        a = self.mixtures[adapter].down()
        wide = F.dropout(self._cast_input_dtype(x, a.dtype), self.mixtures[adapter].chance("input"))
        h = F.linear(wide, a)
        if self.molora_plan[adapter].shared_a:
            h = h.repeat(*[1] * (h.dim() - 1), self.mixtures[adapter].layout.experts)
        return F.dropout(h, self.mixtures[adapter].chance("rank"))

    def _key(self, adapter: str) -> str:
        return f"{adapter}: {self.molora_plan[adapter].block}"

    def _slots(self, adapter: str) -> Slots:
        slots = self.context.slots.get(self._key(adapter))
        if slots is None:
            raise GuilomoError(
                f"Module {self.name!r} ran before the module that routes its feed-forward "
                f"({self.molora_plan[adapter].block!r}). Name the linears in feed_forward_blocks in the order in which "
                "they run."
            )
        return slots

    def constant_gates(self, adapter: str) -> Tensor:
        """Never: the experts are weighted behind a nonlinearity, where no gates make them one matrix."""
        raise GuilomoError(
            f"Module {self.name!r} of adapter {adapter!r} cannot be merged: its experts are whole feed-forwards, "
            "weighted behind the nonlinearity. Keep the adapter unmerged (PeftModel.from_pretrained)."
        )

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As `constant_gates`: there is no one matrix."""
        return self.constant_gates(adapter)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False
