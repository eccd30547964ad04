"""What holds for every structure of experts: where it starts, what it must not see, and its symmetries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import PeftModel

from adapter_tools import attach, gradients, logits
from guilomo import GuilomoError
from guilomo.layers.routers import DenseRouter
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for

STRUCTURES: dict[str, dict[str, Any]] = {
    "HydraLoRA": {"shared_a": True, "router": "dense", "balance_loss": "switch"},
    "MoSLD": {"shared_a": True, "drop_connect": 0.1, "balance_loss": "switch"},
    "Hydra": {"num_experts": 1, "top_k": 1, "sequential_rank": 3, "balance_loss": None},
    "MixLoRA": {"feed_forward_experts": True, "balance_loss": "switch_per_slot"},
}
EVERY = pytest.mark.parametrize("structure", STRUCTURES)
MIXTURES = pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "Hydra"])
"""Those of several experts."""
INPUTS = inputs_for("llama")


def _model(structure: str, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    model = attach(build("llama"), **{**STRUCTURES[structure], **options})
    assert sum(isinstance(m, LoraMoeLayer) for m in model.modules()) == 14
    return model


def _layers(model: PeftModel) -> list[LoraMoeLayer]:
    return [m for m in model.modules() if isinstance(m, LoraMoeLayer)]


@EVERY
def test_starts_at_the_base_model_and_is_it_when_disabled(structure: str) -> None:
    """To the last bit, in training too."""
    wanted = logits(build("llama"), INPUTS)
    model = _model(structure, init_lora_weights=True)
    assert torch.equal(logits(model, INPUTS), wanted)
    assert torch.equal(model.train()(**INPUTS).logits, wanted)
    trained = _model(structure)
    assert not torch.equal(logits(trained, INPUTS), wanted)
    with trained.disable_adapter():
        assert torch.equal(logits(trained, INPUTS), wanted)


@EVERY
def test_padding_content_changes_no_gradient(structure: str) -> None:
    """Task and router losses alike."""
    pads = INPUTS["attention_mask"] == 0
    weighed = {"balance_coefficient": 1.0, "z_loss_coefficient": 0.1} if structure != "Hydra" else {}
    model = _model(structure, **weighed).train()
    found = []
    for ids in (INPUTS["input_ids"], INPUTS["input_ids"].masked_fill(pads, 5)):
        torch.manual_seed(7)
        model.zero_grad()
        loss = model(**{**INPUTS, "input_ids": ids}).loss
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@EVERY
def test_a_row_does_not_see_its_batch(structure: str) -> None:
    inputs = {k: v for k, v in INPUTS.items() if k != "labels"}
    model = _model(structure).double().eval()
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        assert torch.allclose(alone[0], together[row], rtol=1e-9, atol=1e-11)


@torch.no_grad()
def _reorder(layer: LoraMoeLayer, order: list[int]) -> None:
    """Rank rows, columns and router rows of the experts, taken in another order; what they share stays."""
    if len(layer.molora_plan["default"].ranks) == 1:
        return
    rows = torch.tensor([[2 * expert, 2 * expert + 1] for expert in order]).flatten()
    b = layer.molora_B["default"]
    b.copy_(b[:, rows].clone())
    if not layer.molora_plan["default"].shared_a:
        a = layer.molora_A["default"]
        a.copy_(a[rows].clone())
    for router in layer.molora_router.values():
        router.weight.copy_(router.weight[order].clone())


@MIXTURES
def test_the_order_of_the_experts_does_not_matter(structure: str) -> None:
    model = _model(structure).double()
    wanted = logits(model, INPUTS)
    for layer in _layers(model):
        _reorder(layer, [2, 0, 1])
    assert torch.allclose(logits(model, INPUTS), wanted, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def _first_twice(target: LoraMoeLayer, source: LoraMoeLayer) -> None:
    """The experts of `source`, with two copies of the first in its place, and two equal rows of the router."""
    single = len(source.molora_plan["default"].ranks) == 1
    a, b = source.molora_A["default"], source.molora_B["default"]
    target.molora_A["default"].copy_(a if len(a) == len(target.molora_A["default"]) else torch.cat([a[:2], a]))
    target.molora_B["default"].copy_(b if single else torch.cat([b[:, :2], b], dim=1))
    for router in target.molora_router.values():
        scores = source.molora_router["default"].weight
        router.weight.copy_(torch.cat([scores[:1], scores]))


@pytest.mark.parametrize("structure", ["HydraLoRA", "MixLoRA"])
def test_an_expert_split_into_two_halves_changes_nothing(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all experts take part, one of weight p is two copies of weight p / 2."""
    one, two = (_model(structure, router="dense", num_experts=n, balance_loss=None).double() for n in (3, 4))
    for target, source in zip(_layers(two), _layers(one), strict=True):
        _first_twice(target, source)
    wanted = logits(one, INPUTS)
    unsplit = logits(two, INPUTS)
    monkeypatch.setattr(DenseRouter, "score_rows", None)  # so that layers ask for the logits
    halves = torch.tensor([math.log(2), math.log(2), 0.0, 0.0], dtype=torch.float64)
    for layer in _layers(two):
        for router in layer.molora_router.values():
            monkeypatch.setattr(router, "logits", lambda x, scored=router.logits: scored(x) - halves)
    assert torch.allclose(logits(two, INPUTS), wanted, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(unsplit, wanted, rtol=1e-4, atol=1e-6), "two whole copies weigh more than one"


@MIXTURES
def test_token_gates_are_not_merged(structure: str) -> None:
    with pytest.raises(GuilomoError, match="cannot be merged"):
        _model(structure).merge_adapter()


def test_mosld_without_dropout_over_all_experts_is_hydralora() -> None:
    """One A, as many B, every expert chosen: the same model to the last bit, loss and gradients too."""
    found = []
    for structure, options in (("MoSLD", {"drop_connect": 0.0, "top_k": 3}), ("HydraLoRA", {})):
        model = _model(structure, **options).train()
        loss = model(**INPUTS).loss
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
