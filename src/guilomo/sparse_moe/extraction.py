"""Experts of whole feed-forwards as low-rank changes of a common one (FlexMoRE, arXiv 2602.08818), to be attached.

W_e = W_0 + B_e A_e        one pair for every expert and linear, from `guilomo.sparse_moe.factors`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from guilomo.allocation import Allocation, ModulePlan
from guilomo.allocation.blocks import roles_of
from guilomo.export import Factors
from guilomo.files import load_state, save_state
from guilomo.tuner import LoraMoeConfig, LoraMoeLayer


@dataclass(frozen=True)
class Extraction:
    """The experts and their plan.

    Attributes:
        plan: ranks, K and blocks; the scale is 1.
        factors: for every linear the pairs of its experts side by side, ``a (R, I)`` and ``b (O, R)``.
        names: of the experts; None where they have none.
    """

    plan: Allocation
    factors: Mapping[str, Factors]
    names: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        changes: Mapping[str, Sequence[Factors]],
        blocks: Mapping[str, Sequence[str]],
        top_k: int,
        source: str,
        names: Sequence[str] | None = None,
    ) -> Extraction:
        """Puts the changes of all linears together.

        Args:
            changes: for every linear the pair of each expert.
            blocks: feed-forward -> its linears in the order of running.
            top_k: experts that a token uses; at most their number is used.
            source: where they come from, for the plan.
        """
        modules: dict[str, ModulePlan] = {}
        for block, members in blocks.items():
            for name, role in roles_of(members).items():
                pairs = changes[name]
                into, out = pairs[0].a.shape[1], pairs[0].b.shape[0]
                ranks = tuple(pair.rank for pair in pairs)
                modules[name] = ModulePlan(into, out, ranks, min(top_k, len(ranks)), role=role, block=block)
        plan = Allocation(modules, scaling="constant", alpha=1.0, strategy=source)
        return cls(plan, {name: _packed(changes[name]) for name in modules}, None if names is None else tuple(names))

    def attach(self, model: nn.Module, adapter_name: str = "default", **options: Any) -> PeftModel:
        """The model with the experts as an adapter, behind new routers.

        Args:
            options: fields of `LoraMoeConfig` that the experts do not decide. There is no balance loss unless asked
                for: FlexMoRE trains nothing.

        Raises:
            GuilomoError: the model lacks a linear of the plan, or the router cannot be used.
        """
        own = {"allocation": self.plan, "feed_forward_experts": True, "expert_names": self.names and list(self.names)}
        config = LoraMoeConfig(**{"balance_loss": None, **options, **own})
        mixture: PeftModel = get_peft_model(model, config, adapter_name=adapter_name)
        with torch.no_grad():
            for layer in (m for m in mixture.modules() if isinstance(m, LoraMoeLayer) and adapter_name in m.molora_A):
                layer.molora_A[adapter_name].copy_(self.factors[layer.name].a)
                layer.molora_B[adapter_name].copy_(self.factors[layer.name].b)
        return mixture

    def save(self, path: Path) -> None:
        """Writes one safetensors file, from which `load` makes the same to the last bit.

        Raises:
            GuilomoError: it cannot be written.
        """
        tensors = {f"{name}.{part}": getattr(pair, part) for name, pair in self.factors.items() for part in ("a", "b")}
        save_state(path, tensors, {"allocation": self.plan.to_dict(), "names": self.names})

    @classmethod
    def load(cls, path: Path) -> Extraction:
        """Reads what `save` wrote.

        Raises:
            GuilomoError: the file is missing or damaged.
        """
        tensors, facts = load_state(path)
        plan, names = Allocation.from_dict(facts["allocation"]), facts["names"]
        factors = {name: Factors(tensors[f"{name}.a"], tensors[f"{name}.b"]) for name in plan.modules}
        return cls(plan, factors, None if names is None else tuple(names))


def _packed(pairs: Sequence[Factors]) -> Factors:
    return Factors(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs], dim=1))
