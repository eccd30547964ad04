"""TRL's trainers: data formats of `SFTTrainer`, the reference model of `DPOTrainer`, and what is refused."""

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
from trainer_tools import KeepGradients, language_mixture, preference_of, text_of, trl_arguments, word_tokenizer

trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")

TEXT = [{"text": text_of(i, 5 + i % 4)} for i in range(16)]
PAIRS = [{"prompt": f"{text_of(i, 3)} ", "completion": text_of(i + 1, 2 + i % 3)} for i in range(16)]
PREFERENCES = [preference_of(i) for i in range(8)]


def _sft(folder: Path, rows: list[dict[str, str]], **options: Any) -> tuple[Any, KeepGradients, list[dict[str, Any]]]:
    """A trainer after training, its first gradients, and the inputs of every training pass."""
    torch.manual_seed(0)
    kept, seen = KeepGradients(), []
    trainer = trl.SFTTrainer(
        model=build("llama"),
        args=trl_arguments(trl.SFTConfig, folder, per_device_train_batch_size=2, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
        peft_config=language_mixture(z_loss=0.1),
        callbacks=[kept],
    )
    base = trainer.model.get_base_model()
    hook = base.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    hook.remove()
    return trainer, kept, seen


def _came_back(trainer: Any, folder: Path) -> bool:
    """Whether the saved adapter gives the trained outputs, and these are not the base model's."""
    trainer.save_model(str(folder))
    inputs = inputs_for("llama")
    wanted = logits(trainer.model, inputs)
    assert not torch.equal(wanted, logits(build("llama"), inputs))
    return torch.equal(logits(reload(build("llama"), folder), inputs), wanted)


def test_sft_with_prompt_and_completion(tmp_path: Path) -> None:
    """The prompt has no label, and its tokens count for the routers all the same."""
    trainer, kept, seen = _sft(tmp_path, PAIRS, max_steps=2)
    labels = seen[0]["labels"]
    assert (labels != -100).sum(1).tolist() != [labels.shape[1]] * 2
    assert (labels[:, :3] == -100).all()
    assert all(g.abs().max() > 0 for g in kept.gradients.values())
    assert _came_back(trainer, tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:.*(packing|flash|attention implementation).*:UserWarning")  # CPUs have no flash
def test_sft_with_packing(tmp_path: Path) -> None:
    """Packed rows have no padding and no attention mask: every token counts."""
    trainer, kept, seen = _sft(tmp_path, TEXT, max_steps=2, packing=True, max_length=12)
    assert seen[0].get("attention_mask") is None
    layer = next(m for m in trainer.model.modules() if isinstance(m, LoraMoeLayer))
    assert layer.context.counted(torch.zeros(*seen[-1]["input_ids"].shape, 1)) is None
    assert all(g.abs().max() > 0 for g in kept.gradients.values())
    assert _came_back(trainer, tmp_path / "adapter")


def test_dpo_reference_is_the_model_without_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    passes: list[tuple[bool, dict[str, Tensor], Tensor]] = []
    trainer = trl.DPOTrainer(
        model=build("llama"),
        args=trl_arguments(trl.DPOConfig, tmp_path, per_device_train_batch_size=2, max_steps=2),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=word_tokenizer(),
        peft_config=language_mixture(),
    )
    base = trainer.model.get_base_model()
    hook = base.register_forward_hook(
        lambda module, args, kwargs, out: passes.append((torch.is_grad_enabled(), kwargs, out.log_probs.detach())),
        with_kwargs=True,
    )
    trainer.train()
    hook.remove()
    assert trainer.ref_model is None
    assert [trained for trained, _, _ in passes] == [True, False] * 2
    assert _came_back(trainer, tmp_path / "adapter")
    bare = trainer.model.unload().train()
    for trained, inputs, log_probs in passes[:2]:
        with torch.no_grad():
            assert torch.equal(log_probs, bare(**inputs).log_probs) == (not trained)


def test_router_coefficient_of_trl_is_refused(tmp_path: Path) -> None:
    """It is for models that are mixtures themselves; ours has its own coefficients."""
    with pytest.raises(ValueError, match=r"router_aux_loss_coef"):
        _sft(tmp_path, TEXT, router_aux_loss_coef=0.1)
