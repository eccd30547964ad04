"""The layer inside a model, and single-expert mixtures, against references."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapter_tools import attach, gradients
from guilomo import LoraMoeConfig
from guilomo.allocation import Allocation, ModulePlan, ModuleShape
from guilomo.layers.naive import naive_delta, naive_topk_weights
from guilomo.layers.paths import using
from guilomo.tuner import LoraMoeLayer
from guilomo.tuner.router_loss import RouterLoss
from tiny_models import build, inputs_for

pytestmark = pytest.mark.usefixtures("path")


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(13, 7).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


@pytest.mark.parametrize("scaling", ["alpha_over_r", "alpha_over_sqrt_r", "constant"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_layer_equals_the_naive_reference(top_k: int, scaling: str) -> None:
    ranks = [3, 1, 5]
    options = {"target_modules": ["lin"], "rank_pattern": {"lin": ranks}, "top_k": top_k, "scaling": scaling}
    model = attach(OneLinear(), **options, balance_loss=None).double()
    layer = model.base_model.model.lin
    assert isinstance(layer, LoraMoeLayer)
    a, b = layer.molora_A["default"], layer.molora_B["default"]
    w = layer.molora_router["default"].weight
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, 7, dtype=torch.float64)
    y = model(x)
    flat = x.reshape(-1, 13)
    scales = model.peft_config["default"].plan.scales("lin")
    delta = naive_delta(flat, a, b, naive_topk_weights(flat @ w.T, top_k), ranks, scales)
    wanted = layer.base_layer(x) + delta.reshape(2, 5, 7)
    assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-14)
    leaves = (x, a, b, w)
    for ours, naive in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        assert torch.allclose(ours, naive, rtol=1e-12, atol=1e-13 * float(naive.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_one_expert_is_peft_lora(name: str) -> None:
    """Outputs and gradients, with copied weights; alpha / r = 4 is a power of two, so nothing rounds differently."""
    inputs, rank = inputs_for(name), 2
    ours = attach(build(name), num_experts=1, top_k=1, r=rank, lora_alpha=8)
    targets = sorted(ours.peft_config["default"].target_modules)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=targets, fan_in_fan_out=name == "gpt2")
    theirs = get_peft_model(build(name), config)
    here, there = dict(ours.named_modules()), dict(theirs.named_modules())
    for target in targets:
        layer, lora = here[f"base_model.model.{target}"], there[f"base_model.model.{target}"]
        lora.lora_A["default"].weight.data.copy_(layer.molora_A["default"])
        lora.lora_B["default"].weight.data.copy_(layer.molora_B["default"])
    mine, other = ours(**inputs), theirs(**inputs)
    assert torch.equal(mine.logits, other.logits)
    mine.loss.backward()
    other.loss.backward()
    for target in targets:
        layer, lora = here[f"base_model.model.{target}"], there[f"base_model.model.{target}"]
        assert layer.molora_A["default"].grad.abs().max() > 0
        for ours_, theirs_ in ((layer.molora_A, lora.lora_A), (layer.molora_B, lora.lora_B)):
            wanted = theirs_["default"].weight.grad
            assert torch.allclose(ours_["default"].grad, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert not any("molora_router" in n for n, _ in ours.named_parameters())


def test_a_row_does_not_see_its_batch() -> None:
    inputs = {k: v for k, v in inputs_for("llama").items() if k != "labels"}
    model = attach(build("llama")).double().eval()
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        assert torch.allclose(alone[0], together[row], rtol=1e-10, atol=1e-12)


def test_padding_content_changes_no_gradient(path: str) -> None:
    """Task and router losses alike: what stands in the padding is never seen."""
    inputs = inputs_for("llama")
    pads = inputs["attention_mask"] == 0
    model = attach(build("llama"), balance_coefficient=1.0, z_loss_coefficient=0.1)

    def run(tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=tokens, attention_mask=mask, labels=inputs["labels"]).loss.backward()
        return gradients(model)

    other = inputs["input_ids"].masked_fill(pads, 5)
    assert not torch.equal(other, inputs["input_ids"])
    first, second = run(inputs["input_ids"], inputs["attention_mask"]), run(other, inputs["attention_mask"])
    if path == "sorted":  # other pads sort otherwise, and sums round otherwise
        assert all(torch.allclose(first[n], second[n], rtol=1e-4, atol=1e-7) for n in first)
    else:
        assert all(torch.equal(first[n], second[n]) for n in first)
    counted = run(other, torch.ones_like(pads, dtype=torch.long))
    assert not all(torch.equal(first[n], counted[n]) for n in first), "the padding would have mattered"


def test_pooled_rows_are_all_counted() -> None:
    """BERT's pooler sees one token per row, the first: a mask that ends in padding must not drop it."""
    inputs = inputs_for("bert")
    model = attach(build("bert"), balance_coefficient=1.0)
    context = next(m for m in model.modules() if isinstance(m, LoraMoeLayer)).context
    context.record = True
    model(**inputs)
    tokens = {name: float(s.tokens) for name, s in context.statistics.items()}
    assert tokens.pop("bert.pooler.dense") == tokens.pop("classifier") == 3
    assert set(tokens.values()) == {float(inputs["attention_mask"].sum())}


@pytest.mark.parametrize("dropout_on", ["input", "rank"])
def test_dropout(dropout_on: str) -> None:
    """Off in evaluation; in training right on average, and where the input is dropped the router sees all of it."""
    model = attach(OneLinear(), target_modules=["lin"], r=4, lora_dropout=0.4, dropout_on=dropout_on).double()
    x = torch.randn(3, 13, dtype=torch.float64)
    model.eval()
    whole = model(x)
    model.train()
    runs = torch.stack([model(x).detach() for _ in range(800)])
    assert not torch.equal(runs[0], runs[1])
    assert ((runs.mean(0) - whole).abs() < 5 * runs.std(0) / len(runs) ** 0.5).all()
    layer = model.base_model.model.lin
    zero = torch.stack([(run - layer.base_layer(x)).abs().amax(1) for run in runs])
    assert (zero > 0).all()  # single features and ranks are dropped, not whole tokens


class Passing(nn.Module):
    """Has the features of a linear, and hands on its input: its gradient is one that others hold."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 13
        self.weight = nn.Parameter(torch.zeros(13, 13, dtype=torch.float64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("hooked", ["no", "forward", "backward"])
@pytest.mark.parametrize("kind", [Passing, nn.Linear])
def test_what_others_hold_is_left_alone(kind: type[nn.Module], hooked: str) -> None:
    """A residual around a layer that passes its gradient on, and hooks that keep what they are shown."""
    kept: list[torch.Tensor] = []
    base = Passing() if kind is Passing else nn.Linear(13, 13).double().requires_grad_(False)
    if hooked == "forward":
        base.register_forward_hook(lambda module, args, output: kept.append(output))
    if hooked == "backward":
        base.register_full_backward_hook(lambda module, inputs, outputs: kept.append(inputs[0]))
    model = attach(OneLinear(), target_modules=["lin"], balance_loss=None).double()
    donor = model.base_model.model.lin
    layer = LoraMoeLayer(base, "lin", ModuleShape(13, 13), donor.context)
    plan = Allocation({"lin": ModulePlan(13, 13, (2, 3), 2)})
    config = LoraMoeConfig(init_lora_weights=False, target_modules=["lin"])
    layer.update_layer("default", plan, config, RouterLoss("", 1, None, 0.0, 0.0, 1.0))
    layer.double().set_adapter("default")
    x = torch.randn(80, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(80, 13, dtype=torch.float64)
    y = x.sin()
    z = y + layer(y)
    seen = [t.clone() for t in kept]
    (found,) = torch.autograd.grad(z, x, dy.clone())
    with using("packed"):
        again = x.sin()
        (wanted,) = torch.autograd.grad(again + layer(again), x, dy)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(now, then) for now, then in zip(kept, seen, strict=False))
    if hooked == "backward" and kind is nn.Linear:
        assert torch.allclose(kept[0], dy @ base.weight, rtol=1e-12, atol=1e-13)
