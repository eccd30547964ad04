"""What tests of transformers' and TRL's trainers share: short texts, arguments for a CPU, the gradients of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, TrainerCallback

from guilomo import LoraMoeConfig
from tiny_models import VOCABULARY


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word w3, w4, ..."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text_of(start: int, words: int) -> str:
    return " ".join(f"w{3 + (start * 7 + i * 5) % (VOCABULARY - 3)}" for i in range(words))


def preference_of(start: int) -> dict[str, str]:
    return {"prompt": f"{text_of(start, 3)} ", "chosen": text_of(start + 1, 4), "rejected": text_of(start + 2, 4)}


class KeepGradients(TrainerCallback):
    """The gradients that the optimiser is given at the first step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trl_arguments(kind: type, folder: Path, **options: Any) -> Any:
    """An `SFTConfig` or `DPOConfig` of one step."""
    fixed = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    given = {"save_strategy": "no", "max_grad_norm": 0.0, "max_steps": 1, "activation_checkpointing": False, **options}
    return kind(output_dir=str(folder), dataloader_pin_memory=False, learning_rate=0.01, **fixed, **given)


def language_mixture(z_loss: float = 0.0, **options: Any) -> LoraMoeConfig:
    """A mixture for a language model whose only router loss is the z-loss, a mean over tokens."""
    given = {"num_experts": 3, "r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return LoraMoeConfig(task_type="CAUSAL_LM", balance_loss=None, z_loss_coefficient=z_loss, **given)
