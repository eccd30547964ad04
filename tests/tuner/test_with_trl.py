"""TRL: trainers that compute their own loss train the mixture, and its router losses follow their scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from adapter_tools import logits, reload
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for
from trainer_tools import KeepGradients, language_mixture, text_of, trl_arguments, word_tokenizer

trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")


@pytest.fixture
def tokenizer() -> Any:
    return word_tokenizer()


def _sft(folder: Path, tokenizer: Any, z_loss: float = 0.0, **options: Any) -> tuple[Any, KeepGradients]:
    torch.manual_seed(0)
    kept = KeepGradients()
    rows = Dataset.from_list([{"text": text_of(i, 9)} for i in range(16)])
    trainer = trl.SFTTrainer(
        model=build("llama"),
        args=trl_arguments(trl.SFTConfig, folder, **options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=language_mixture(z_loss),
        callbacks=[kept],
    )
    trainer.train()
    return trainer, kept


def _auxiliary(folder: Path, tokenizer: Any, **options: Any) -> Tensor:
    with_loss, without = (_sft(folder, tokenizer, z, **options)[1].gradients for z in (10.0, 0.0))
    return torch.cat([(with_loss[n] - without[n]).flatten() for n in with_loss if "router" in n])


def test_sft_trains_saves_and_reloads(tmp_path: Path, tokenizer: Any) -> None:
    trainer, kept = _sft(tmp_path, tokenizer, 0.1, max_steps=3, per_device_train_batch_size=2)
    assert any(isinstance(m, LoraMoeLayer) for m in trainer.model.modules())
    assert all(g.abs().max() > 0 for g in kept.gradients.values())
    trainer.save_model(str(tmp_path / "adapter"))
    inputs = inputs_for("llama")
    wanted = logits(trainer.model, inputs)
    assert torch.equal(logits(reload(build("llama"), tmp_path / "adapter"), inputs), wanted)
    assert not torch.equal(logits(build("llama"), inputs), wanted)


def test_sft_router_losses_follow_the_scale(tmp_path: Path, tokenizer: Any) -> None:
    """Rows of equal length: the z-loss, a mean over tokens, must not depend on how a batch is cut."""
    whole = _auxiliary(tmp_path, tokenizer, per_device_train_batch_size=4)
    assert whole.norm() > 1e-3
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    for options in (cut, {**cut, "activation_checkpointing": True}):
        parts = _auxiliary(tmp_path, tokenizer, **options)
        assert (parts - whole).norm() < 1e-3 * whole.norm(), float(parts.norm() / whole.norm())


def test_preference_losses_keep_the_router_losses(tmp_path: Path, tokenizer: Any) -> None:
    """DPO pushes chosen answers up and rejected ones down; their sum must not cancel the router losses."""
    rows = [{"prompt": text_of(i, 3), "chosen": text_of(i + 1, 4), "rejected": text_of(i + 2, 4)} for i in range(8)]
    found = []
    for z_loss in (10.0, 0.0):
        torch.manual_seed(0)
        kept = KeepGradients()
        trainer = trl.DPOTrainer(
            model=build("llama"),
            args=trl_arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=4),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=language_mixture(z_loss),
            callbacks=[kept],
        )
        trainer.train()
        found.append(kept.gradients)
    auxiliary = torch.cat([(g - found[1][n]).flatten() for n, g in found[0].items() if "router" in n])
    reference = _auxiliary(tmp_path, tokenizer, per_device_train_batch_size=4)
    assert 0.5 < auxiliary.norm() / reference.norm() < 2
