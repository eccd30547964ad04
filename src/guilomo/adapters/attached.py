"""A base model with one adapter at a time: no copy of the base is made, and it is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from torch import nn


@contextmanager
def attached(model: nn.Module, folder: Path) -> Iterator[PeftModel]:
    """The model with the adapter of a folder, until the block ends.

    PEFT's own `unload` leaves modules that the adapter trained whole in the place of the model's, the model's
    parameters frozen and its modules in evaluation mode; here all of that is put back.
    """
    places = [(module, dict(module._modules), module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        try:
            yield adapted
        finally:
            adapted.unload()
    finally:
        for module, children, training in places:
            module._modules, module.training = children, training
        for parameter, needed in trained:
            parameter.requires_grad_(needed)
