"""transformers' Trainer: training, exact resume, and router losses that follow its scaling of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from adapter_tools import attach, logits, reload
from tiny_models import VOCABULARY, build, inputs_for
from trainer_tools import KeepGradients

ROWS = 16


class Rows(torch.utils.data.Dataset):
    """Labelled rows; those of a language model differ in the number of their label tokens."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(3, VOCABULARY, (ROWS, 7), generator=generator)
        if name == "vit":
            self.rows = [
                {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 3} for i in range(ROWS)
            ]
        elif name == "bert":
            self.rows = [
                {"input_ids": t, "attention_mask": torch.ones(7), "labels": i % 3} for i, t in enumerate(tokens)
            ]
        else:
            mask = (torch.arange(7) < torch.tensor([3, 7]).repeat(ROWS // 2)[:, None]).long()
            labels = tokens.masked_fill(mask == 0, -100)
            keys = ("input_ids", "attention_mask", "labels")
            self.rows = [dict(zip(keys, row, strict=True)) for row in zip(tokens, mask, labels, strict=True)]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def _arguments(folder: Path, **options: Any) -> TrainingArguments:
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    given = {"per_device_train_batch_size": 2, "learning_rate": 0.01, "max_grad_norm": 0.0, "max_steps": 1, **options}
    return TrainingArguments(output_dir=str(folder), **{**fixed, **given})


def _model(name: str, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return attach(build(name), **options)


def _train(model: PeftModel, name: str, folder: Path, resume: bool = False, **options: Any) -> KeepGradients:
    kept = KeepGradients()
    trainer = Trainer(model=model, args=_arguments(folder, **options), train_dataset=Rows(name), callbacks=[kept])
    trainer.train(resume_from_checkpoint=resume)
    return kept


def _weights(model: PeftModel) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if "molora" in n}


def test_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    """Six steps, and three steps plus three resumed in a new process's place: the weights are bit-equal."""
    straight, stopped, resumed = (_model("llama", lora_dropout=0.1, balance_coefficient=0.1) for _ in range(3))
    before = _weights(straight)
    _train(straight, "llama", tmp_path / "straight", max_steps=6)
    assert all(not torch.equal(before[n], w) for n, w in _weights(straight).items() if "ranks" not in n)
    # the schedule is that of six steps from the start
    kept = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trainer = Trainer(
        model=stopped, args=_arguments(tmp_path / "run", **kept), train_dataset=Rows("llama"), callbacks=[_StopAfter(3)]
    )
    trainer.train()
    assert trainer.state.global_step == 3
    _train(resumed, "llama", tmp_path / "run", resume=True, **kept)
    wanted, found = _weights(straight), _weights(resumed)
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


class _StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def test_checkpoints_are_adapters(tmp_path: Path) -> None:
    model = _model("llama")
    _train(model, "llama", tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    again = reload(build("llama"), tmp_path / "checkpoint-2")
    assert torch.equal(logits(again, inputs_for("llama")), logits(model, inputs_for("llama")))
    assert "import guilomo" in (tmp_path / "checkpoint-2" / "README.md").read_text()


def test_classification_with_a_trained_head(tmp_path: Path) -> None:
    model = _model("bert", modules_to_save=["classifier"], task_type="SEQ_CLS")
    _train(model, "bert", tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    again = reload(build("bert"), tmp_path / "checkpoint-4")
    inputs = inputs_for("bert")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert not torch.equal(logits(again, inputs), logits(build("bert"), inputs))


def _router_gradients(name: str, folder: Path, z_loss: float, **options: Any) -> Tensor:
    """All router gradients of the first step. The z-loss is a mean over tokens, so micro-batches can be compared."""
    model = _model(name, balance_loss=None, z_loss_coefficient=z_loss)
    kept = _train(model, name, folder, **options)
    return torch.cat([g.flatten() for n, g in kept.gradients.items() if "router" in n])


def _auxiliary(name: str, folder: Path, **options: Any) -> Tensor:
    """What the router losses add to the router gradients of the first step."""
    with_loss = _router_gradients(name, folder, 10.0, **options)
    return with_loss - _router_gradients(name, folder, 0.0, **options)


@pytest.mark.parametrize("name", ["llama", "vit", "bert"])
def test_accumulation_does_not_inflate_router_losses(name: str, tmp_path: Path) -> None:
    """One batch of 4 against 2 and 4 micro-batches: uncorrected, the gradient would be 2 and 4 times too large.

    The micro-batches of a language model differ in their label tokens, and it is by those that the Trainer weighs
    them, while the z-loss of the whole batch is a mean over its tokens: hence the wider tolerance there.
    """
    whole = _auxiliary(name, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert whole.norm() > 1e-3
    tolerance = 0.15 if name == "llama" else 1e-3
    for size, steps in ((2, 2), (1, 4)):
        parts = _auxiliary(name, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        assert (parts - whole).norm() < tolerance * whole.norm(), (size, steps, float(parts.norm() / whole.norm()))


def test_recomputation_inside_the_trainer(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = _router_gradients("llama", tmp_path, 10.0, **options)
    for reentrant in (True, False):
        recomputed = _router_gradients(
            "llama",
            tmp_path,
            10.0,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
            **options,
        )
        assert torch.equal(plain, recomputed)
