"""What of a mixture is trained: its routers alone, or its experts too."""

from __future__ import annotations

from peft import PeftModel

from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.tuner import LoraMoeConfig, LoraMoeLayer

TRAINED = ("router", "all")


def train_only(model: PeftModel, train: str, adapter: str = "default") -> None:
    """Changes what of a mixture is trained: sets `requires_grad`, and the config's `train`, which is saved with it.

    A mixture that is saved and loaded with ``is_trainable=True`` trains the same parameters. Modules that are trained
    whole (`modules_to_save`) are not touched.

    Args:
        model: with the mixture attached.
        train: "router": its routers alone, as MeteoRA (arXiv 2405.13053); or "all": the experts too.
        adapter: PEFT's name of the mixture.

    Raises:
        GuilomoError: no such choice or adapter, the adapter is no mixture, or it has no router to train.
    """
    if train not in TRAINED:
        raise unknown("train", train, TRAINED)
    if adapter not in model.peft_config:
        raise unknown("adapter", adapter, model.peft_config)
    config = model.peft_config[adapter]
    if not isinstance(config, LoraMoeConfig):
        raise invalid("adapter", adapter, "a mixture of LoRA experts", "Use PEFT's own set_requires_grad.")
    layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer) and adapter in m.molora_A]
    if train == "router" and not any(_has_parameters(layer, adapter) for layer in layers):
        raise nothing_to_train()
    config.train = train
    for layer in layers:
        layer.molora_train[adapter] = train
        layer.set_requires_grad(adapter, adapter in layer.active_adapters)


def nothing_to_train() -> GuilomoError:
    """The error for a mixture of which only routers are to be trained, and which has none with parameters."""
    return GuilomoError(
        "train = 'router' leaves nothing to train: the mixture has one expert per module or fixed weights. Use at "
        "least two adapters and a trained router such as 'topk', or train='all'."
    )


def _has_parameters(layer: LoraMoeLayer, adapter: str) -> bool:
    return adapter in layer.molora_router and any(True for _ in layer.molora_router[adapter].parameters())
