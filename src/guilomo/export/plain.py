"""Copies of an adapted model without the mixture: merged into the weights, or taken off."""

from __future__ import annotations

import copy

from peft import PeftModel
from torch import nn

from guilomo.export.gates import refuse_routed


def merged_copy(model: PeftModel) -> nn.Module:
    """A transformers model whose weights contain the active mixture; `model` stays as it is.

    Raises:
        GuilomoError: the gates of a module depend on the token, or merged weights are not finite.
    """
    refuse_routed(model)
    merged: nn.Module = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    return merged


def unadapted_copy(model: PeftModel) -> nn.Module:
    """The base model without the adapter, as a model of its own that shares the weights of `model`.

    Another adapter can be loaded into it while `model` is in use; merging one would change both.
    """
    weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    base: nn.Module = copy.deepcopy(model, weights).unload()
    return base
