"""The down-projections of a module's adapters, of which those that can be made again are neither trained nor saved."""

from __future__ import annotations

from typing import Any

from torch import nn

from guilomo.layers.frozen import SparseGaussian


class DownProjections(nn.ParameterDict):
    """``A (R, I)`` by adapter. What `frozen` has a recipe for does not appear in state dicts, and loads without.

    Attributes:
        frozen: recipes by adapter.
    """

    def __init__(self) -> None:
        self.frozen: dict[str, SparseGaussian] = {}
        super().__init__()

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.frozen.pop(key, None)

    def freeze(self) -> None:
        """PEFT makes all parameters of active adapters trainable; this takes it back."""
        for adapter in self.frozen:
            self[adapter].requires_grad_(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for adapter in self.frozen:
            destination.pop(prefix + adapter, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for adapter, recipe in self.frozen.items():
            held = self[adapter]
            # Under low_cpu_mem_usage there is nothing but a shape yet.
            state_dict.setdefault(prefix + adapter, recipe() if held.is_meta else held.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)
