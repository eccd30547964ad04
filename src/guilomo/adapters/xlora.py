"""PEFT's own X-LoRA of a bank's adapters, so that it can be compared with a mixture of the same ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from peft.tuners.xlora.layer import XLoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from guilomo.adapters.fit import module_shapes, refuse_other_base
from guilomo.adapters.lora import CONFIG, LoraAdapter, read_adapter
from guilomo.adapters.mixture import Adapters, named_folders
from guilomo.errors import GuilomoError, invalid
from guilomo.files import check_adapter
from guilomo.files.adapter import WEIGHTS

CLASSIFIER = "base_model.internal_xlora_classifier"


def xlora_of(
    model: nn.Module,
    adapters: Adapters,
    *,
    names: Sequence[str] | None = None,
    top_k: int | None = None,
    layerwise: bool = True,
    depth: int = 1,
    size: int = 2048,
    dropout: float = 0.2,
    temperature: float = 1.0,
) -> PeftModel:
    """PEFT's X-LoRA (arXiv 2402.07148): a classifier on the last hidden states weighs frozen adapters for every token.

    Every forward pass runs the model twice: without adapters, for the hidden states that the classifier reads, and with
    them. The classifier alone is trained. PEFT refuses models with `use_cache`, so that it is turned off in the model's
    config, and numbers the adapters; they have the order in which they are given.

    Args:
        model: the base model. adapters, names: as in `mixture_of`.
        top_k: how many adapters a token uses, weighted by a softmax over their scores; unset: all.
        layerwise: scores for every adapted module, as in the paper; or one for all of them, PEFT's default.
        depth: linear layers of the classifier. size, dropout: of its hidden layers, where depth is above 1.
        temperature: of the softmax over all adapters.

    Raises:
        GuilomoError: as `mixture_of`; or PEFT cannot do it: modules outside ``model.``, of which it loses the weights;
            modules trained whole; `top_k` where its softmax mixes tokens, see `softmax_is_per_token`.
    """
    if isinstance(model, PeftModel):
        raise invalid("model", type(model).__name__, "the base model", "Pass model.unload(), or load the base anew.")
    read = [read_adapter(folder, name) for name, folder in named_folders(adapters, names).items()]
    shapes = module_shapes(model)
    for adapter in read:
        refuse_other_base(adapter, shapes)
        refuse_unloadable(adapter)
    if top_k is not None:
        _check_top_k(top_k, len(read), temperature)
    settings: Any = model.config
    settings.use_cache = False
    config = XLoraConfig(
        task_type=read[0].config.task_type,
        hidden_size=settings.get_text_config().hidden_size,
        adapters={str(index): str(adapter.folder) for index, adapter in enumerate(read)},
        # Exactly one softmax: over all adapters, or over those that are kept.
        enable_softmax=top_k is None,
        enable_softmax_topk=top_k is not None,
        top_k_lora=top_k,
        softmax_temperature=temperature,
        layerwise_scalings=layerwise,
        xlora_depth=depth,
        xlora_size=size,
        xlora_dropout_p=dropout,
        use_trainable_adapters=False,
    )
    adapted: Any = get_peft_model(model, config)
    return adapted  # type: ignore[no-any-return]


def save_xlora(model: PeftModel, folder: str | Path) -> None:
    """Writes the classifier, in PEFT's layout, and copies of the adapters, in subfolders with their numbers.

    ``save_pretrained`` of PEFT 0.21.2 loses the classifier, whose weights (``layers.0.weight``) it takes for those of
    adapter 0, and writes the base model into the folder of every adapter.

    Raises:
        GuilomoError: the model is no X-LoRA, or its adapters are no longer where they were read.
    """
    folder, config = Path(folder), model.peft_config[model.active_adapter]
    if not isinstance(config, XLoraConfig):
        raise invalid("model", str(config.peft_type), "an X-LoRA", "Other models are saved by save_pretrained.")
    for name, source in config.adapters.items():
        read_adapter(source)
        if Path(source).resolve() != (folder / name).resolve():
            (folder / name).mkdir(parents=True, exist_ok=True)
            for file in (CONFIG, WEIGHTS):
                shutil.copyfile(Path(source) / file, folder / name / file)
    classifier: Any = model.get_submodule(CLASSIFIER)
    state = {f"{CLASSIFIER}.{key}": value.detach().cpu().contiguous() for key, value in classifier.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_xlora(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """An X-LoRA that `save_xlora` wrote, with the adapters that lie beside it.

    ``PeftModel.from_pretrained`` of PEFT 0.21 reads them from where they lay when it was made, also where it is given
    others.

    Args:
        model: the base model; its config's `use_cache` is turned off. folder: where it was saved.
        is_trainable: whether to go on training the classifier.

    Raises:
        GuilomoError: the folder holds no X-LoRA, lacks the classifier or an adapter, or a file of it is damaged.
    """
    folder = Path(folder)
    try:
        config = XLoraConfig.from_pretrained(str(folder))
    except (OSError, TypeError, ValueError) as error:
        raise invalid("folder", str(folder), "a folder with a saved X-LoRA", str(error)) from error
    if not isinstance(config, XLoraConfig):
        raise invalid("folder", str(folder), "a folder with a saved X-LoRA", f"This is {config.peft_type}.")
    check_adapter(folder)
    for name in config.adapters:
        read_adapter(folder / name)
    config.adapters = {name: str(folder / name) for name in config.adapters}
    settings: Any = model.config
    settings.use_cache = False
    loaded: PeftModel = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)
    if not is_trainable:
        loaded.requires_grad_(False)
    return loaded


def restore_xlora(model: PeftModel, folder: str | Path) -> None:
    """Puts the classifier that `save_xlora` wrote into an X-LoRA of the same adapters.

    Raises:
        GuilomoError: the classifier there is of another shape.
    """
    saved = load_file(Path(folder) / WEIGHTS)
    classifier: Any = model.get_submodule(CLASSIFIER)
    try:
        classifier.load_state_dict({key.removeprefix(f"{CLASSIFIER}."): value for key, value in saved.items()})
    except RuntimeError as error:
        raise invalid("folder", str(folder), "the classifier of an X-LoRA of as many adapters", str(error)) from error


def softmax_is_per_token() -> bool:
    """Whether the installed PEFT's `enable_softmax_topk` gives every token weights that sum to 1.

    Earlier versions picked the kept scores with a boolean mask, which flattens them, so that the softmax ran over all
    tokens of the batch together.
    """
    config = SimpleNamespace(top_k_lora=2, enable_softmax_topk=True)
    scores = torch.tensor([[[1.0, 2.0, 3.0], [3.0, 1.0, 5.0]]])[:, :, None]
    layer: Any = SimpleNamespace(layer_number=0, config=config)
    weights = XLoraLayer.get_maybe_topk_scalings(layer, scores)
    return bool(torch.allclose(weights.sum(-1), torch.ones(1, 2)))


def _check_top_k(top_k: int, adapters: int, temperature: float) -> None:
    if not isinstance(top_k, int) or not 1 <= top_k <= adapters:
        raise invalid("top_k", top_k, f"a whole number from 1 to {adapters}, the adapters; or unset for all")
    if temperature != 1:
        raise invalid(
            "temperature", temperature, "1 with top_k", "PEFT applies it to the softmax over all adapters only."
        )
    if not softmax_is_per_token():
        raise GuilomoError(
            f"top_k = {top_k} needs a softmax per token, and that of PEFT {peft.__version__} runs over all tokens of a "
            "batch together. Use a later PEFT, or leave top_k unset."
        )


def refuse_unloadable(adapter: LoraAdapter) -> None:
    """Refuses an adapter that PEFT's X-LoRA would load in part only.

    Raises:
        GuilomoError: it has modules outside ``model.``, or modules trained whole.
    """
    outside = [module for module in adapter.pairs if not module.startswith("model.")]
    if outside:
        raise invalid(
            f"adapter {adapter.name!r}: module",
            outside[0],
            "a module in 'model', where PEFT's X-LoRA looks for all of them",
            "Use mixture_of, which has no such limit.",
        )
    if adapter.others:
        remedy = "PEFT's X-LoRA loads low-rank changes only. Use mixture_of, which has no such limit."
        raise invalid(f"adapter {adapter.name!r}: also saved", next(iter(adapter.others)), "nothing", remedy)
