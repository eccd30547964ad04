"""Fine-tuning with Trainer, and the callbacks on a Trainer of one's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from guilomo import GuilomoError, LoraMoeConfig
from guilomo.run import Run
from guilomo.training import (
    Interrupted,
    ProgressCallback,
    RouterHealthCallback,
    TrainConfig,
    fine_tune,
    training_arguments,
)
from guilomo.training.fine_tune import loss_curve
from guilomo.tuner import context_of
from guilomo.tuner.biases import biased_routers
from tiny_runs import run_of

CONFIG = TrainConfig(max_steps=7, batch_size=8, log_every=3, save_every=2, schedule="constant_with_warmup")


@pytest.fixture
def job(colour_recipe: Any) -> Run:
    return run_of(colour_recipe())


def adapted(job: Run, **options: Any) -> Any:
    model = job.fresh_model(0)
    settings = {"num_experts": 3, "r": 2, "top_k": 2, "task_type": "SEQ_CLS", **options}
    return get_peft_model(model, LoraMoeConfig(**settings))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trainer_of(job: Run, model: Any, folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=8,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        **{"logging_steps": 3, "save_strategy": "no", **options},
    )
    return Trainer(
        model=model, args=arguments, train_dataset=job.task.train, data_collator=job.task.collate, callbacks=callbacks
    )


def test_router_health_on_a_plain_trainer(job: Run, tmp_path: Path) -> None:
    model = adapted(job)
    context = context_of(model.get_base_model())
    callback = RouterHealthCallback(context)
    trainer = trainer_of(job, model, tmp_path, [callback])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [3, 6]
    for log in logs:
        assert 0 <= log["router_load_entropy"] <= 1
        assert log["router_dead_experts"] == int(log["router_dead_experts"])
    routed = {name for name, m in model.get_base_model().named_modules() if hasattr(m, "molora_A")}
    assert set(callback.health) == routed
    for health in callback.health.values():
        assert sum(health.load) == pytest.approx(1)
        assert health.load_entropy == pytest.approx(-sum(p * math.log(p) for p in health.load if p) / math.log(3))
    mean = sum(h.load_entropy for h in callback.health.values()) / len(callback.health)
    assert logs[-1]["router_load_entropy"] == pytest.approx(mean)
    assert context.record is False


def test_counts_are_of_the_tokens_since_the_last_reading(job: Run, tmp_path: Path) -> None:
    """At the end nothing is left over: the last reading took the last tokens."""
    model = adapted(job)
    context = context_of(model.get_base_model())
    seen: list[float] = []

    class Watch(RouterHealthCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            statistics = next((s for name, s in self.context.statistics.items() if "layer.0" in name), None)
            if statistics is not None:
                seen.append(float(statistics.tokens))
            super().on_log(*args, **kwargs)

    trainer = trainer_of(job, model, tmp_path, [Watch(context)], max_grad_norm=0.0)
    trainer.train()
    order = torch.randperm(len(job.task.train), generator=torch.Generator().manual_seed(0))
    assert len(order) == 36
    lengths = sum(len(row["input_ids"]) for row in job.task.train)
    # 6 batches of 8 rows: one pass over 36 rows in 5 batches, and 8 rows of the next.
    assert len(seen) == 2
    assert lengths < sum(seen) < 2 * lengths


def test_health_with_distance_between_readings(job: Run, tmp_path: Path) -> None:
    model = adapted(job)
    callback = RouterHealthCallback(context_of(model.get_base_model()), every=4)
    trainer = trainer_of(job, model, tmp_path, [callback], logging_steps=1)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "router_load_entropy" in log] == [4]


def test_a_short_training_is_read_at_its_end(job: Run, tmp_path: Path) -> None:
    result = fine_tune(adapted(job), job.task, CONFIG.model_copy(update={"log_every": 50}), tmp_path)
    assert result.health
    assert [step for step, _ in result.loss_curve] == [7]


def test_the_loss_curve_is_the_mean_of_the_steps() -> None:
    assert loss_curve([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [(2, 2.0), (4, 6.0), (5, 9.0)]
    assert loss_curve([1.0, 3.0], 2) == [(2, 2.0)]
    assert loss_curve([], 2) == []


def test_what_fine_tune_returns(job: Run, tmp_path: Path) -> None:
    model = adapted(job)
    before = weights(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    steps: list[tuple[int, int, str]] = []
    result = fine_tune(model, job.task, CONFIG, tmp_path, progress=lambda *step: steps.append(step))
    assert result.steps == 7
    assert [step for step, _ in result.loss_curve] == [3, 6, 7]
    assert result.seconds > 0
    assert result.step_seconds == pytest.approx(result.seconds / 7)
    assert [(step, of) for step, of, _ in steps] == [(n, 7) for n in range(1, 8)]
    assert steps[-1][2].startswith("loss ")
    after = weights(model)
    assert all(not torch.equal(before[n], after[n]) for n in before if "molora_B" in n or "classifier" in n)
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
def test_a_stopped_training_continues_to_the_same_bits(job: Run, tmp_path: Path, stop: int) -> None:
    changes = {"lora_dropout": 0.1}
    whole = adapted(job, **changes)
    wanted = fine_tune(whole, job.task, CONFIG, tmp_path / "whole", seed=5)
    seen = 0

    def asked() -> bool:
        nonlocal seen
        seen += 1
        return seen >= stop

    with pytest.raises(Interrupted, match=f"step {stop} of 7"):
        fine_tune(adapted(job, **changes), job.task, CONFIG, tmp_path / "cut", seed=5, should_stop=asked)
    model = adapted(job, **changes)
    found = fine_tune(model, job.task, CONFIG, tmp_path / "cut", seed=5)
    assert equal(weights(model), weights(whole))
    assert found.loss_curve == wanted.loss_curve
    assert found.health == wanted.health


@pytest.mark.parametrize(
    "options",
    [
        {"router": "sinkhorn", "router_options": {"q": 0.5}, "balance_loss": None},
        {"shared_a": True, "drop_connect": 0.3},
    ],
    ids=["SSR", "MoSLD"],
)
def test_methods_that_draw_continue_to_the_same_bits(job: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    """Coins and masks drawn after a stop are those that an unbroken training draws."""
    whole = adapted(job, **options)
    fine_tune(whole, job.task, CONFIG, tmp_path / "whole", seed=5)
    asks = iter([False, False, True])
    with pytest.raises(Interrupted):
        fine_tune(adapted(job, **options), job.task, CONFIG, tmp_path / "cut", seed=5, should_stop=lambda: next(asks))
    again = adapted(job, **options)
    fine_tune(again, job.task, CONFIG, tmp_path / "cut", seed=5)
    assert equal(weights(again), weights(whole))


def test_a_finished_training_is_taken_up_as_it_is(job: Run, tmp_path: Path) -> None:
    """Trainer itself would take one more step, here at a constant rate."""
    first, second = adapted(job), adapted(job)
    wanted = fine_tune(first, job.task, CONFIG, tmp_path)
    steps: list[int] = []
    found = fine_tune(second, job.task, CONFIG, tmp_path, progress=lambda step, *rest: steps.append(step))
    assert equal(weights(first), weights(second))
    assert (found.loss_curve, found.health, found.steps) == (wanted.loss_curve, wanted.health, 7)
    assert found.step_seconds is None
    assert steps == []


def test_a_seed_changes_the_order_and_nothing_else_does(job: Run, tmp_path: Path) -> None:
    curves = [
        fine_tune(adapted(job), job.task, CONFIG, tmp_path / str(i), seed=seed).loss_curve
        for i, seed in enumerate((1, 1, 2))
    ]
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_held_out_rows_are_trained_on_unless_told_otherwise(job: Run, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": None, "epochs": 1.0})
    result = fine_tune(adapted(job), job.task, config, tmp_path / "all")
    assert result.steps == 6  # 48 rows in batches of 8
    config = config.model_copy(update={"use_held_out": False})
    assert fine_tune(adapted(job), job.task, config, tmp_path / "part").steps == 5  # 36 rows


def test_checkpointing_activations_changes_nothing(job: Run, tmp_path: Path) -> None:
    plain, spared = adapted(job), adapted(job)
    a = fine_tune(plain, job.task, CONFIG, tmp_path / "a")
    config = CONFIG.model_copy(update={"gradient_checkpointing": True})
    b = fine_tune(spared, job.task, config, tmp_path / "b")
    assert [step for step, _ in a.loss_curve] == [step for step, _ in b.loss_curve]
    for (_, x), (_, y) in zip(a.loss_curve, b.loss_curve, strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    assert a.health == b.health


def test_a_loss_that_is_not_finite_stops_the_training(job: Run, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 100})
    with pytest.raises(GuilomoError, match=r"training loss was nan at step \d, first in.*now 1e\+30"):
        fine_tune(adapted(job), job.task, config, tmp_path)


def test_progress_callback_without_functions(job: Run, tmp_path: Path) -> None:
    trainer = trainer_of(job, adapted(job), tmp_path, [ProgressCallback(None, None)])
    trainer.train()
    assert trainer.state.global_step == 6


def test_arguments_follow_the_config(tmp_path: Path) -> None:
    config = TrainConfig(epochs=2, accumulation=3, warmup_ratio=0.1, schedule="cosine", save_every=9)
    arguments = training_arguments(config, tmp_path, seed=4, use_cpu=True)
    assert arguments.num_train_epochs == 2
    assert arguments.gradient_accumulation_steps == 3
    assert arguments.warmup_steps == 0.1
    assert arguments.seed == arguments.data_seed == 4
    assert arguments.save_steps == 9
    assert arguments.device.type == "cpu"


def test_biases_move_with_the_steps_and_resume_to_the_same_bits(job: Run, tmp_path: Path) -> None:
    options = {"router": "loss_free", "router_options": {"rate": 0.05}, "balance_loss": None}

    def biases(model: Any) -> list[torch.Tensor]:
        return [router.bias for router in biased_routers(model)]

    torch.manual_seed(1)
    whole = adapted(job, **options)
    fine_tune(whole, job.task, CONFIG, tmp_path / "whole", seed=5)
    assert max(float(b.abs().max()) for b in biases(whole)) > 0.05
    asks = iter([False, False, True])
    torch.manual_seed(1)
    with pytest.raises(Interrupted):
        fine_tune(adapted(job, **options), job.task, CONFIG, tmp_path / "cut", seed=5, should_stop=lambda: next(asks))
    torch.manual_seed(1)
    again = adapted(job, **options)
    fine_tune(again, job.task, CONFIG, tmp_path / "cut", seed=5)
    assert equal(weights(again), weights(whole))
    assert all(torch.equal(a, b) for a, b in zip(biases(again), biases(whole), strict=True))
