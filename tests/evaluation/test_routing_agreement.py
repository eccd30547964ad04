"""Routing agreement between precisions: equal to a loop over tokens, exact where nothing is rounded."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapter_tools import attach
from guilomo import GuilomoError
from guilomo.evaluation import routing_agreement
from router_cases import CASES, options_of, with_tasks
from tiny_models import build, inputs_for

INPUTS = inputs_for("llama")
MANY = inputs_for("llama", rows=20)


def _inputs_of(model: PeftModel, name: str, batch: dict[str, Tensor], autocast: bool) -> Tensor:
    """What one module reads."""
    seen: list[Tensor] = []
    layer = model.get_base_model().get_submodule(name)
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("cast", ["model", "autocast"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_equal_to_a_loop_over_real_tokens(top_k: int, cast: str) -> None:
    model = attach(build("llama"), top_k=top_k, num_experts=16).eval()
    other = copy.deepcopy(model).bfloat16() if cast == "model" else model
    found = routing_agreement(model, [MANY], other if cast == "model" else torch.bfloat16)
    assert any(agreement.same < 1 for agreement in found.values()), "no token changed its experts: nothing is tested"
    for name, agreement in found.items():
        first = _inputs_of(model, name, MANY, False)
        second = _inputs_of(other, name, MANY, cast == "autocast")
        routers = [m.get_base_model().get_submodule(name).molora_router["default"] for m in (model, other)]
        same, moved, tokens = 0, 0.0, 0
        for row, mask in enumerate(MANY["attention_mask"].tolist()):
            for token, real in enumerate(mask):
                if not real:
                    continue
                with torch.no_grad():
                    one, two = (r(x[row, token][None]) for r, x in zip(routers, (first, second), strict=True))
                same += set(one.chosen[0].nonzero().flatten().tolist()) == set(
                    two.chosen[0].nonzero().flatten().tolist()
                )
                moved += float((one.weights - two.weights).abs().sum()) / 2
                tokens += 1
        assert agreement.tokens == tokens == int(MANY["attention_mask"].sum())
        assert agreement.same == same / tokens
        assert agreement.moved == pytest.approx(moved / tokens, rel=1e-3)


@pytest.mark.parametrize("router", sorted(set(CASES) - {"fixed"}))
def test_every_router_agrees_with_itself_and_mostly_with_bfloat16(router: str) -> None:
    inputs = with_tasks(router, INPUTS)
    model = attach(build("llama"), **options_of(router))
    for agreement in routing_agreement(model, [inputs], copy.deepcopy(model)).values():
        assert (agreement.same, agreement.moved) == (1.0, 0.0)
    found = routing_agreement(model, [inputs])
    assert len(found) == 14
    assert sum(agreement.same for agreement in found.values()) / len(found) > 0.8
    # Every rank that FlyLoRA chooses otherwise moves a whole gate.
    assert all(agreement.moved < (0.5 if router == "flylora" else 0.1) for agreement in found.values())


def test_a_router_held_in_half_precision_cannot_tell_near_ties_apart() -> None:
    """Two experts whose rows differ by less than bfloat16 can hold: rounding the input alone leaves the choice."""
    model = attach(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), target_modules=["1"], top_k=1)
    router = model.get_base_model()[1].molora_router["default"]
    with torch.no_grad():
        router.weight[2] = 0
        router.weight[:2] = router.weight[:1] + 1e-4 * torch.randn(2, 32)
    batches = [{"input": torch.randn(400, 32)}]
    (of_x,) = routing_agreement(model, batches).values()
    rounded = copy.deepcopy(model)
    rounded.get_base_model()[1].molora_router["default"].weight.data = router.weight.detach().bfloat16().float()
    (of_weights,) = routing_agreement(model, batches, rounded).values()
    assert of_x.tokens == of_weights.tokens == 400
    assert of_x.same > 0.98
    assert of_weights.same < 0.9
    assert of_weights.moved > 10 * of_x.moved


def test_batches_add_up_and_padding_is_not_counted() -> None:
    model = attach(build("llama"))
    rows = [{k: v[i : i + 1] for k, v in INPUTS.items()} for i in range(3)]
    whole, parts = routing_agreement(model, [INPUTS]), routing_agreement(model, rows)
    pads = INPUTS["attention_mask"] == 0
    other = routing_agreement(model, [{**INPUTS, "input_ids": INPUTS["input_ids"].masked_fill(pads, 5)}])
    for name, agreement in whole.items():
        assert agreement == other[name]
        assert parts[name].tokens == agreement.tokens
        assert parts[name].moved == pytest.approx(agreement.moved, rel=0.2)


def test_experts_of_feed_forwards_have_one_router_a_block() -> None:
    model = attach(build("llama"), feed_forward_experts=True, balance_loss=None)
    found = routing_agreement(model, [INPUTS])
    assert set(found) == {f"model.layers.{layer}.mlp.gate_proj" for layer in range(2)}


def test_mode_and_hooks_are_put_back() -> None:
    model = attach(build("llama")).train()
    routing_agreement(model, [INPUTS])
    assert model.training
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n.endswith("q_proj"))


def test_what_cannot_be_compared_is_refused() -> None:
    model = attach(build("llama"))
    with pytest.raises(GuilomoError, match=r"seen no token.*Give at least one row"):
        routing_agreement(model, [])
    for without in (
        attach(build("llama"), router="fixed"),
        get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])),
    ):
        with pytest.raises(GuilomoError, match="No module of the active adapter routes"):
            routing_agreement(without, [INPUTS])
    with pytest.raises(GuilomoError, match=r"half = .*in only one"):
        routing_agreement(model, [INPUTS], attach(build("llama"), target_modules=["q_proj"]))
