"""Tasks of rows: from the model's keyword, or from a column of token rows, to the router losses that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, default_data_collator

from adapter_tools import attach, gradients
from guilomo import GuilomoError
from guilomo.layers import balance_loss, router_statistics
from guilomo.tasks.collate import Collator
from guilomo.tuner import LoraMoeLayer, context_of, tasks_given
from tiny_models import build, inputs_for

LOCALIZED: dict[str, Any] = {"router": "dense", "balance_loss": "localized", "balance_coefficient": 1.0}
TASKS = torch.tensor([0, 1, 1])


def _gradients(mode: str = "none", task_type: str | None = None, tasks: Tensor = TASKS) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = attach(build("llama"), **LOCALIZED, task_type=task_type).train()
    if mode != "none":
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        base.enable_input_require_grads()
    model(**inputs_for("llama"), router_task_ids=tasks).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_tasks_reach_the_losses(task_type: str | None) -> None:
    """PEFT's typed wrappers pass the keyword on, the base model never sees it, and the tasks matter."""
    found, other = _gradients(task_type=task_type), _gradients(task_type=task_type, tasks=1 - TASKS)
    routers = [name for name in found if "router" in name]
    assert any((found[name] - other[name]).abs().max() > 1e-3 for name in routers)


def test_the_base_model_never_sees_the_keyword() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)

    model = attach(Strict(), target_modules=["lin"], **LOCALIZED).train()
    model(torch.randn(3, 4, 6), router_task_ids=TASKS).sum().backward()
    assert gradients(model)


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_recomputation_changes_nothing(mode: str) -> None:
    wanted, found = _gradients(), _gradients(mode)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_loss_is_the_hand_summed_one() -> None:
    """Padding left out, and every module by itself."""
    found = _gradients()
    torch.manual_seed(0)
    model = attach(build("llama"), router="dense", balance_loss=None).train()
    inputs, losses = inputs_for("llama"), []

    def keep(layer: LoraMoeLayer, args: tuple[Tensor, ...]) -> None:
        routing = layer.routing(args[0])
        statistics = router_statistics(routing, inputs["attention_mask"], frozenset({"rows"}), TASKS)
        losses.append(balance_loss("localized", statistics))

    for layer in model.modules():
        if isinstance(layer, LoraMoeLayer):
            layer.register_forward_pre_hook(keep)
    loss = model(**inputs).loss
    (loss + sum(losses)).backward()
    for name, gradient in gradients(model).items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_without_tasks_the_error_says_how_to_give_them() -> None:
    model = attach(build("llama"), **LOCALIZED).train()
    with pytest.raises(GuilomoError, match=r"router_task_ids.*remove_unused_columns=False.*tasks_given"):
        model(**inputs_for("llama"))
    model.eval()(**inputs_for("llama"))  # no loss, nothing to read


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (torch.tensor([0.0, 1.0, 1.0]), r"router_task_ids = .*float32.*one whole number per row"),
        (torch.tensor([[0, 1, 1]]), r"router_task_ids = .*\(1, 3\).*one whole number per row"),
        (torch.tensor([0, 1]), r"router_task_ids = 'for 2 rows'.*has 3 rows"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(tasks: Tensor, message: str) -> None:
    context = context_of(build("llama"))
    context.task = tasks
    with pytest.raises(GuilomoError, match=message):
        context.tasks_for(torch.zeros(3, 7, 4))


def test_rows_of_a_layer_may_be_several_per_row_of_the_batch() -> None:
    context = context_of(build("llama"))
    context.task = TASKS
    assert context.tasks_for(torch.zeros(6, 4)).tolist() == [0, 0, 1, 1, 1, 1]


def test_tasks_given_hold_for_passes_that_name_none() -> None:
    model = attach(build("llama"))
    context = context_of(model.get_base_model())
    inputs = {k: v for k, v in inputs_for("llama").items() if k != "labels"}
    with tasks_given(model, TASKS):
        model(**inputs)
        assert context.task is TASKS
        model(**inputs, router_task_ids=1 - TASKS)
        assert context.task.tolist() == [1, 0, 0]
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert context.task is TASKS
    model(**inputs)
    assert context.task is None


def test_collated_with_the_rows() -> None:
    row = {"input_ids": [3, 4], "attention_mask": [1, 1], "labels": 1}
    collate = Collator(pad_id=0, multiple=1, max_length=8)
    assert "router_task_ids" not in collate([row])
    batch = collate([{**row, "router_task_ids": t} for t in (2, 0)])
    assert batch["router_task_ids"].tolist() == [2, 0]
    assert batch["router_task_ids"].dtype == torch.int64


def test_trainer_keeps_the_column(tmp_path: Path) -> None:
    model = attach(build("llama"), **LOCALIZED)
    inputs = inputs_for("llama")
    rows = [{k: v[i] for k, v in inputs.items()} | {"router_task_ids": int(TASKS[i])} for i in range(3)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()
    context = context_of(model.get_base_model())
    assert sorted(context.task.tolist()) == [0, 1, 1]
