"""Which modules of a model can be adapted, and their shapes."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from guilomo.allocation.plan import ModuleShape
from guilomo.errors import GuilomoError, invalid
from guilomo.tuner.config import LoraMoeConfig


def linear_shape(module: nn.Module) -> ModuleShape | None:
    """``(I, O)`` of a linear-like module (plain, quantised, `Conv1D`, or one already adapted); None for others."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return ModuleShape(int(module.weight.shape[0]), int(module.weight.shape[1]))
    if isinstance(module, (nn.Bilinear, nn.MultiheadAttention)):
        return None
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return ModuleShape(into, out) if isinstance(into, int) and isinstance(out, int) else None


def adaptable_modules(model: nn.Module) -> dict[str, ModuleShape]:
    """Every linear-like module of a base model by dotted path, seen through adapters that are already there."""
    found: dict[str, ModuleShape] = {}
    inside = _insides(model)
    for name, module in model.named_modules():
        if not name or name.startswith(inside) or isinstance(module, AuxiliaryTrainingWrapper):
            continue
        shape = linear_shape(module)
        if shape is not None:
            found[name] = shape
    return found


def _insides(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of what lies inside adapted layers and inside PEFT's wrappers of modules that are trained whole."""
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return tuple(f"{name}." for name, module in model.named_modules() if name and isinstance(module, wrappers))


def target_shapes(model: nn.Module, config: LoraMoeConfig) -> dict[str, ModuleShape]:
    """The modules that ``config.target_modules`` and its companions select, with their shapes.

    Raises:
        GuilomoError: nothing matches, or something that matches is not a linear layer.
    """
    _fill_in_targets(model, config)
    shapes = adaptable_modules(model)
    inside = _insides(model)
    chosen: dict[str, ModuleShape] = {}
    for name, module in model.named_modules():
        matched = bool(name) and not name.startswith(inside) and bool(check_target_module_exists(config, name))
        if matched and name in shapes:
            chosen[name] = shapes[name]
        elif matched:
            raise invalid(
                "target_modules",
                name,
                f"linear layers, but this is a {type(module).__name__}",
                "Name it in exclude_modules, or train it whole by naming it in modules_to_save.",
            )
    if not chosen:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in shapes})
        raise invalid("target_modules", config.target_modules, "names that match; this model has " + ", ".join(kinds))
    return chosen


def _fill_in_targets(model: nn.Module, config: LoraMoeConfig) -> None:
    """PEFT's defaults for a known architecture, and its reading of 'all-linear'."""
    if config.target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type or "")
        if defaults is None:
            raise GuilomoError(
                f"target_modules is not set and there is no default for model type {model_type!r}. "
                "Name the linear layers to adapt, for example target_modules='all-linear'."
            )
        config.target_modules = defaults if isinstance(defaults, str) else set(defaults)  # type: ignore[assignment]
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        _maybe_include_all_linear_layers(config, model)
        # PEFT knows adapted linears by a class name that contains "Linear", and takes the copies of a trained head
        # (modules_to_save) for linears of the model: a second adapter would miss the former and get the latter.
        head = getattr(model, "get_output_embeddings", lambda: None)()
        adapted = {n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and m is not head}
        named = adapted | set(config.target_modules or ())
        config.target_modules = named & set(adaptable_modules(model))  # type: ignore[assignment]
