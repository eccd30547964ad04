"""What router losses add to the gradient of a step, under every trainer, is the hand-summed reference.

The reference: for every micro-batch that the trainer passed through the model, the router losses of all modules are
computed from the routings by hand, multiplied by the micro-batch's share of the step's loss, and differentiated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from adapter_tools import attach, gradients
from guilomo import LoraMoeConfig
from guilomo.layers import balance_loss, router_statistics, z_loss
from guilomo.training import AccumulationCallback
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for
from trainer_tools import KeepGradients, preference_of, text_of, trl_arguments, word_tokenizer

BALANCE, Z = 0.5, 0.1
PLAIN = {"balance_coefficient": 0.0, "z_loss_coefficient": 0.0}
ROWS = [{"text": text_of(i, 4 + 3 * (i % 2))} for i in range(16)]
PREFERENCES = [preference_of(i) for i in range(8)]


def _options(losses: bool) -> dict[str, Any]:
    coefficients = {"balance_coefficient": BALANCE, "z_loss_coefficient": Z} if losses else PLAIN
    return {"num_experts": 3, "r": 2, "target_modules": "all-linear", "init_lora_weights": False, **coefficients}


def _mixture(losses: bool) -> nn.Module:
    torch.manual_seed(0)
    return attach(build("llama"), **_options(losses)).train()


def _hand_summed(batches: list[dict[str, Any]], shares: list[float]) -> dict[str, Tensor]:
    """Gradient of ``sum over micro-batches of share * sum over modules of (balance + z loss)``."""
    model = _mixture(losses=False)
    for batch, share in zip(batches, shares, strict=True):
        values: list[Tensor] = []

        def loss_of(layer: LoraMoeLayer, args: tuple[Tensor, ...], batch: dict[str, Any] = batch) -> None:
            statistics = router_statistics(layer.molora_router["default"](args[0]), batch.get("attention_mask"))
            values.append(BALANCE * balance_loss("switch", statistics) + Z * z_loss(statistics))  # noqa: B023

        layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer)]
        hooks = [layer.register_forward_pre_hook(loss_of) for layer in layers]
        model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")})
        (share * torch.stack(values).sum()).backward()
        for hook in hooks:
            hook.remove()
    # No router stands behind the last mixture's experts: the losses do not reach them.
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


def _trainer(kind: str, losses: bool, folder: Path, options: dict[str, Any], kept: KeepGradients) -> Any:
    if kind == "Trainer":
        fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_grad_norm": 0.0, "max_steps": 1}
        return Trainer(
            model=_mixture(losses),
            args=TrainingArguments(str(folder), save_strategy="no", **fixed, **options),
            train_dataset=[{"input_ids": t} for t in word_tokenizer()([r["text"] for r in ROWS])["input_ids"]],
            data_collator=_padded,
            callbacks=[kept],
        )
    trl = pytest.importorskip("trl", reason="the extra 'trl' is not installed")
    return getattr(trl, kind)(
        model=build("llama"),
        args=trl_arguments(getattr(trl, kind.replace("Trainer", "Config")), folder, **options),
        train_dataset=Dataset.from_list(ROWS if kind == "SFTTrainer" else PREFERENCES),
        processing_class=word_tokenizer(),
        peft_config=LoraMoeConfig(task_type="CAUSAL_LM", **_options(losses)),
        callbacks=[kept, AccumulationCallback()],
    )


def _trained(kind: str, losses: bool, folder: Path, options: dict[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    """The gradients of one step, and the inputs of its micro-batches."""
    torch.manual_seed(0)
    kept, seen = KeepGradients(), []
    trainer = _trainer(kind, losses, folder, options, kept)
    trainer.model.load_state_dict(_mixture(losses).state_dict())

    def note(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            seen.append(inputs)

    trainer.model.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    return {n: g for n, g in kept.gradients.items() if "molora" in n}, seen


def _padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    batch = word_tokenizer().pad(rows, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def _shares(batches: list[dict[str, Any]], by_labels: bool) -> list[float]:
    counts = [int((b["labels"][:, 1:] != -100).sum()) if by_labels else 1 for b in batches]
    return [count / sum(counts) for count in counts]


RECOMPUTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_\\w+` is deprecated:FutureWarning")  # TRL 1.16 calls it
@pytest.mark.parametrize("recomputation", [{}, RECOMPUTED, REENTRANT], ids=["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer", "DPOTrainer"])
def test_router_losses_of_a_step(kind: str, steps: int, recomputation: dict[str, Any], tmp_path: Path) -> None:
    """Rows of unequal length: micro-batches differ in their label tokens, by which SFT and the Trainer weigh them."""
    options = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, **recomputation}
    with_losses, batches = _trained(kind, True, tmp_path, options)
    without, _ = _trained(kind, False, tmp_path, options)
    assert len(batches) == steps
    shares = _shares(batches, by_labels=kind != "DPOTrainer")
    wanted = _hand_summed(batches, shares)
    assert wanted.keys() == with_losses.keys() == without.keys()
    found = torch.cat([(with_losses[n] - without[n]).flatten() for n in wanted])
    reference = torch.cat([g.flatten() for g in wanted.values()])
    assert reference.norm() > 0.05
    assert (found - reference).norm() <= 1e-5 * reference.norm()


def test_reported_loss_is_the_task_loss() -> None:
    inputs = inputs_for("llama")
    assert torch.equal(_mixture(True)(**inputs).loss, _mixture(False)(**inputs).loss)


def test_mixed_precision_scaling_is_followed() -> None:
    """A scaler multiplies the loss by 65536 and divides the gradients again: exact, for both are powers of two."""
    inputs, model = inputs_for("llama"), _mixture(True)
    model(**inputs).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(model(**inputs).loss).backward()
    scaler.unscale_(optimizer)
    assert all(torch.equal(g, wanted[n]) for n, g in gradients(model).items())


def test_callback_ends_with_the_training(tmp_path: Path) -> None:
    """A later training without it must not inherit the weight."""
    model = _mixture(True)
    scale = next(m for m in model.modules() if isinstance(m, LoraMoeLayer)).context.scale
    callback, arguments = AccumulationCallback(), TrainingArguments(str(tmp_path), gradient_accumulation_steps=4)
    callback.on_train_begin(arguments, None, None, model=model)
    assert scale.unmeasured == 0.25
    callback.on_train_end(arguments, None, None, model=model)
    assert scale.unmeasured == 1.0
