"""Which configurations of PEFT's LoRA are a plain sum of low-rank changes, ``y = W0 x + s B A x``, and nothing more."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig

from guilomo.errors import invalid

_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "base_model_name_or_path"}
_WHERE = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_OF_TRAINING = {"lora_dropout", "inference_mode", "init_lora_weights", "eva_config"}
_NO_EFFECT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
}
ALLOWED = _READ | _WHERE | _OF_TRAINING | _NO_EFFECT
"""Fields of `LoraConfig` that may have any value. The others may change what an adapter computes, and must have their
default, so that a field that a later PEFT adds is refused rather than overlooked."""

STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the frozen weight as it is; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA do not."""

REMEDIES = {
    "use_dora": "DoRA rescales the whole weight, so its experts cannot be added up: train it without use_dora.",
    "bias": "A mixture has no biases to choose from: train the adapter with bias='none'.",
    "lora_bias": "A mixture has no biases to choose from: train the adapter with lora_bias=False.",
    "trainable_token_indices": "Trained embeddings are no experts: train the adapter without them.",
    "target_parameters": "Only linear modules have experts: train the adapter with target_modules.",
}
GENERAL = "Train the adapter as plain LoRA, or convert it where peft.convert_to_lora supports that."


def refuse_special(where: str, config: LoraConfig) -> None:
    """Refuses an adapter that is more than low-rank changes of linear modules.

    Args:
        where: how the user knows the adapter, for the message.
        config: its configuration.

    Raises:
        GuilomoError: names the field at fault and the remedy.
    """
    usual = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # An option that is off may be spelled None, False or empty, whatever its default.
        if field.name not in ALLOWED and value and value != getattr(usual, field.name):
            raise _special(where, field.name, value, repr(getattr(usual, field.name)))
    if config.init_lora_weights not in STARTS:
        raise invalid(
            f"{where}: init_lora_weights",
            config.init_lora_weights,
            "one of " + ", ".join(map(repr, STARTS)),
            "This start changes the frozen weights, which all experts share. Save the adapter as plain LoRA first: "
            "model.save_pretrained(folder, path_initial_model_for_weight_conversion=...).",
        )


def _special(where: str, name: str, value: Any, usual: str) -> Exception:
    return invalid(f"{where}: {name}", value, usual, REMEDIES.get(name, GENERAL))
