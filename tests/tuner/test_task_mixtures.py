"""Mixtures that know tasks, in a model: merged for one task, trained in stages, and packed from plain LoRAs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from adapter_tools import attach, gradients, logits, reload, train_a_step
from guilomo import GuilomoError, LoraMoeConfig
from guilomo.adapters import train_only
from guilomo.export import mean_gates, plain_lora
from guilomo.tuner import (
    LoraMoeLayer,
    expert_weights,
    fixed_gates,
    preservation_loss,
    task_gates,
)
from router_cases import TASKS, options_of
from tiny_models import build, inputs_for

INPUTS = inputs_for("llama")


def _of_task(task: int) -> dict[str, Tensor]:
    return {**INPUTS, "router_task_ids": torch.full((3,), task)}


def test_one_task_merges_exactly() -> None:
    """Into the frozen weights, and into plain LoRA; a module with one expert has no router and merges too."""
    model = attach(build("llama").double(), **options_of("task"), rank_pattern={"q_proj": [3]}).double()
    wanted, other = logits(model, _of_task(1)), logits(model, _of_task(2))
    assert (wanted - other).abs().max() > 1e-4
    gates = task_gates(model, 1)
    assert {len(g) for g in gates.values()} == {1, 3}
    export = plain_lora(model, gates)
    lora = get_peft_model(build("llama").double(), export.config)
    lora.load_state_dict(
        {k.replace(".weight", ".default.weight"): v for k, v in export.state_dict().items()}, strict=False
    )
    assert torch.allclose(logits(lora, INPUTS), wanted, rtol=1e-9, atol=1e-10)
    with fixed_gates(model, gates):
        merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, INPUTS), wanted, rtol=1e-9, atol=1e-10)


def test_merging_without_a_task_says_how() -> None:
    model = attach(build("llama"), **options_of("task"))
    with pytest.raises(GuilomoError, match=r"One task can be merged: .*fixed_gates\(model, task_gates"):
        model.merge_adapter()
    with pytest.raises(GuilomoError, match=r"task = 3.*3 tasks, from 0"):
        task_gates(model, 3)
    with pytest.raises(GuilomoError, match=r"gates depend on the token"):
        task_gates(attach(build("llama")), 0)


def test_token_gates_are_not_merged_at_fixed_gates() -> None:
    model = attach(build("llama"))
    gates = {m.name: torch.ones(3) for m in model.modules() if isinstance(m, LoraMoeLayer)}
    with fixed_gates(model, gates), pytest.raises(GuilomoError, match=r"cannot be merged"):
        model.merge_adapter()


def test_mean_gates_of_a_task() -> None:
    model = attach(build("llama"), **options_of("task"))
    found, wanted = mean_gates(model, [_of_task(1)]), task_gates(model, 1)
    assert all(torch.allclose(found[name], wanted[name].double(), rtol=1e-5) for name in wanted)


def test_hard_stage_trains_the_expert_of_the_task_alone() -> None:
    options = {"router": "lora_mixer", "router_options": {"stage": "hard"}, "balance_loss": None}
    model = attach(build("llama"), **options).train()
    model(**_of_task(1)).loss.backward()
    found = gradients(model)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}, "none is missing"
    for name, gradient in found.items():
        if "router" in name:
            assert not gradient.any()
        else:
            experts = gradient.split(2, dim=0 if "molora_A" in name else 1)
            assert [bool(g.any()) for g in experts] == [False, True, False]


def test_hard_stage_is_the_lora_of_the_task() -> None:
    options = {"router": "lora_mixer", "router_options": {"stage": "hard"}, "balance_loss": None}
    model = attach(build("llama").double(), **options).double()
    lora = get_peft_model(build("llama").double(), LoraConfig(r=2, lora_alpha=16, target_modules="all-linear"))
    _copy_expert(model, lora, 2)
    assert torch.allclose(logits(model, _of_task(2)), logits(lora, INPUTS), rtol=1e-9, atol=1e-11)


def _copy_expert(model: PeftModel, lora: PeftModel, expert: int) -> None:
    there = dict(lora.named_modules())
    for layer in model.modules():
        if isinstance(layer, LoraMoeLayer):
            target = there[f"base_model.model.{layer.name}"]
            rows = slice(2 * expert, 2 * expert + 2)
            target.lora_A["default"].weight.data.copy_(layer.molora_A["default"][rows])
            target.lora_B["default"].weight.data.copy_(layer.molora_B["default"][:, rows])


def test_second_stage_goes_on_with_the_first(tmp_path: Path) -> None:
    options = {"router": "lora_mixer", "router_options": {"stage": "hard"}, "balance_loss": None}
    model = attach(build("llama"), **options)
    train_a_step(model, {**INPUTS, "router_task_ids": TASKS})
    model.save_pretrained(tmp_path)
    config = LoraMoeConfig.from_pretrained(str(tmp_path))
    config.router_options = {"stage": "soft"}
    config.balance_loss = "divergence"
    again = reload(build("llama"), tmp_path, config=config, is_trainable=True)
    assert preservation_loss(again, expert_weights(model)).item() == 0.0, "experts start where the first stage ended"
    train_only(again, "router")
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained
    assert all("molora_router" in n for n in trained)
    before = {n: p.clone() for n, p in again.named_parameters()}
    train_a_step(again, INPUTS)
    moved = {n for n, p in again.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained


def test_preservation_is_zero_at_the_start_and_pulls_back() -> None:
    model = attach(build("llama"))
    start = expert_weights(model)
    assert preservation_loss(model, start).item() == 0.0
    train_a_step(model, INPUTS)
    loss = preservation_loss(model, start)
    now = expert_weights(model)
    assert loss.item() == pytest.approx(sum(float((now[n] - t).square().sum()) for n, t in start.items()), rel=1e-4)
    loss.backward()
    layer = next(m for m in model.modules() if isinstance(m, LoraMoeLayer))
    moved = layer.molora_A["default"].detach() - start[f"{layer.name}.A"]
    assert torch.allclose(layer.molora_A["default"].grad, 2 * moved, rtol=1e-5)
    with pytest.raises(GuilomoError, match=r"expert_weights\(model\)"):
        preservation_loss(attach(build("llama"), r=3), start)


def test_only_routers_without_any_is_refused() -> None:
    with pytest.raises(GuilomoError, match=r"leaves nothing to train"):
        train_only(attach(build("llama"), router="fixed"), "router")


def test_meteora_over_plain_loras_of_mixed_rank_and_alpha() -> None:
    """Adapters packed into a mixture: a gate forced onto one of them is PEFT's forward with it alone."""
    shapes = {"a": (1, 3.0), "b": (4, 16.0), "c": (2, 5.0)}
    ranks = [r for r, _ in shapes.values()]
    options = options_of("meteora", top_k=1, rank_pattern={".*": ranks})
    model = attach(build("llama").double(), **options, target_modules=["q_proj", "up_proj"]).double()
    plan = model.peft_config["default"].plan
    for expert, (rank, alpha) in enumerate(shapes.values()):
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        lora = get_peft_model(build("llama").double(), config)
        there, rows = dict(lora.named_modules()), slice(sum(ranks[:expert]), sum(ranks[: expert + 1]))
        for layer in model.modules():
            if isinstance(layer, LoraMoeLayer):
                source = there[f"base_model.model.{layer.name}"]
                layer.molora_A["default"].data[rows] = source.lora_A["default"].weight.data
                # The plan has one alpha for all; what an adapter's own scale differs from it goes into B.
                folded = (alpha / rank) / plan.scales(layer.name)[expert]
                layer.molora_B["default"].data[:, rows] = folded * source.lora_B["default"].weight.data
        wanted = logits(lora, INPUTS)
        for layer in model.modules():
            if isinstance(layer, LoraMoeLayer):
                router = layer.molora_router["default"]
                router.logits = lambda x, e=expert: 9 * torch.eye(3).double()[e].expand(*x.shape[:-1], 3)
                type(router).score_rows = property(lambda self: None)
        try:
            assert torch.allclose(logits(model, INPUTS), wanted, rtol=1e-9, atol=1e-11)
        finally:
            del type(router).score_rows


def test_meteora_training_needs_tasks_only_for_its_loss() -> None:
    model = attach(build("llama"), **options_of("meteora")).train()
    with pytest.raises(GuilomoError, match=r"router_task_ids"):
        model(**INPUTS)
    model.eval()(**INPUTS)
    attach(build("llama"), **options_of("meteora", router_loss_coefficient=0.0)).train()(**INPUTS)


def test_hmora_leans_on_the_task_with_depth() -> None:
    model = attach(build("llama"), **options_of("hmora"))
    mixes = {m.name: m.molora_router["default"].mix.item() for m in model.modules() if isinstance(m, LoraMoeLayer)}
    assert {m for n, m in mixes.items() if "layers.0." in n} == {-2.0}
    assert {m for n, m in mixes.items() if "layers.1." in n} == {2.0}
    tables = [n for n, _ in model.named_parameters() if "molora_shared" in n]
    assert len(tables) == 1
