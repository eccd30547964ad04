"""What routers have in common: made once per adapter and key, saved, counted and optimised once."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adapter_tools import attach, gradients, logits, reload, train_a_step
from guilomo import LoraMoeConfig
from guilomo.allocation import ModuleShape, uniform
from guilomo.allocation.budget import fit
from guilomo.allocation.preference import Preference
from guilomo.layers.routers import cost_of_router
from guilomo.tuner import LoraMoeLayer, target_shapes
from router_cases import options_of, with_tasks
from tiny_models import build, inputs_for

SPARSEGEN = options_of("sparsegen")


def _held(model: nn.Module, adapter: str = "default") -> dict[int, set[int]]:
    """Identities of the shared parts by input width."""
    found: dict[int, set[int]] = {}
    for layer in model.modules():
        if isinstance(layer, LoraMoeLayer) and adapter in layer.molora_router:
            found.setdefault(layer.in_features, set()).add(id(layer.molora_router[adapter]._held[0]))
    return found


def _registered(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if "molora_shared" in name]


def test_one_per_width() -> None:
    model = attach(build("llama"), **SPARSEGEN)
    held = _held(model)
    assert set(held) == {32, 48}
    assert all(len(parts) == 1 for parts in held.values())
    assert len(_registered(model)) == 2 * 4
    assert len({id(p) for n, p in model.named_parameters() if "molora_shared" in n}) == 8


def test_saved_once_and_shared_again(tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"), **SPARSEGEN)
    train_a_step(model, inputs)
    model.save_pretrained(tmp_path)
    assert sum("molora_shared" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 8
    for low_memory in (False, True):
        again = reload(build("llama"), tmp_path, low_cpu_mem_usage=low_memory, is_trainable=True)
        assert all(len(parts) == 1 for parts in _held(again).values())
        assert torch.equal(logits(again, inputs), logits(model, inputs))
        train_a_step(again, inputs)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(way: object) -> None:
    model = attach(build("llama"), **SPARSEGEN)
    other = way(model)
    assert all(len(parts) == 1 for parts in _held(other).values())
    assert not {i for parts in _held(other).values() for i in parts} & {i for p in _held(model).values() for i in p}
    registered = {
        id(m) for layer in other.modules() if isinstance(layer, LoraMoeLayer) for m in layer.molora_shared.values()
    }
    assert {i for parts in _held(other).values() for i in parts} == registered


def test_every_module_teaches_it() -> None:
    """The gradient is the sum over all modules that hold it: it differs when one of them does not."""
    inputs = inputs_for("llama")
    options = {**SPARSEGEN, "balance_loss": None, "router_loss_coefficient": 0.0}
    model = attach(build("llama"), **options).train()
    for name, p in model.named_parameters():
        if "molora_shared" in name:
            nn.init.normal_(p, std=0.5)
    model(**inputs).loss.backward()
    whole = {n: g for n, g in gradients(model).items() if "molora_shared" in n}
    assert len(whole) == 8
    assert all(g.any() for g in whole.values())
    last = [m for m in model.modules() if isinstance(m, LoraMoeLayer) and m.in_features == 32][-1]
    router = last.molora_router["default"]
    router._held = (copy.deepcopy(router._held[0]).requires_grad_(False),)
    model.zero_grad()
    model(**inputs).loss.backward()
    parted = gradients(model)
    assert any(not torch.allclose(whole[n], parted[n], rtol=1e-3) for n in whole)


def test_moved_and_cast_with_the_model() -> None:
    model = attach(build("llama"), **SPARSEGEN).double()
    assert {p.dtype for n, p in model.named_parameters() if "molora_shared" in n} == {torch.float64}
    assert all(len(parts) == 1 for parts in _held(model).values())
    half = attach(build("llama").bfloat16(), **SPARSEGEN)
    assert {p.dtype for n, p in half.named_parameters() if "molora_shared" in n} == {torch.float32}


def test_each_adapter_has_its_own(tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"), adapter="first", **SPARSEGEN)
    alone = logits(model, inputs)
    model.add_adapter(
        "second", LoraMoeConfig(**{"num_experts": 3, "r": 2, "target_modules": "all-linear", **SPARSEGEN})
    )
    assert not {i for p in _held(model, "first").values() for i in p} & {
        i for p in _held(model, "second").values() for i in p
    }
    model.set_adapter("second")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".second" in n for n in trained)
    model.set_adapter("first")
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(logits(model, inputs), alone)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(build("llama"), tmp_path / "first"), inputs), alone)


def test_a_module_with_one_expert_neither_holds_nor_hosts() -> None:
    model = attach(build("llama"), **SPARSEGEN, rank_pattern={r"layers\.0\..*": [3]})
    names = _registered(model)
    assert len(names) == 8
    assert all("layers.1." in name for name in names)
    config = model.peft_config["default"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert config.plan.parameters(cost_of_router("sparsegen", config.router_options)) == trained


def test_budgets_pay_for_it_once() -> None:
    model = build("llama")
    shapes = target_shapes(model, LoraMoeConfig(target_modules="all-linear"))
    cost = cost_of_router("sparsegen", {"hidden": 5})
    shared = sum(i * 5 + 5 + 5 + 1 for i in (32, 48))
    plain = uniform(shapes, experts=3, rank=2, top_k=2)
    assert plain.parameters(cost) == plain.parameters() + shared
    assert plain.active_parameters(cost) > plain.active_parameters()
    assert plain.flops_per_token(cost) - plain.flops_per_token() == 2 * sum(
        s.in_features * 5 + 11 for s in shapes.values()
    )
    budget = plain.parameters(cost)
    wish = Preference(dict.fromkeys(shapes, 3.0), dict.fromkeys(shapes, (2.0,) * 3))
    plan = fit(wish, shapes, top_k=2, budget=budget, max_experts=4, router=cost)
    row = max(ModuleShape(*s).in_features + ModuleShape(*s).out_features for s in shapes.values())
    assert budget - row < plan.parameters(cost) <= budget
    attached = attach(build("llama"), **SPARSEGEN, allocation=plan)
    assert sum(p.numel() for p in attached.parameters() if p.requires_grad) == plan.parameters(cost)


def test_gradients_under_recomputation_are_those_without() -> None:
    found: list[dict[str, Tensor]] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = attach(build("llama"), **SPARSEGEN).train()
        if recompute:
            model.get_base_model().activation_checkpointing_enable()
            model.get_base_model().enable_input_require_grads()
        model(**with_tasks("sparsegen", inputs_for("llama"))).loss.backward()
        found.append({n: g for n, g in gradients(model).items() if "molora_shared" in n})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])
