"""Hydra: a low-rank branch behind the frozen linear, beside the parallel one or alone, and its exact merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapter_tools import attach, gradients, logits, reload, train_a_step
from guilomo import Allocation, GuilomoError, LoraMoeConfig, ModulePlan
from guilomo.export import mean_gates, merged_copy, plain_lora
from guilomo.search import SearchConfig
from guilomo.search.mixture import SearchMixture
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for

HYDRA = {"num_experts": 1, "top_k": 1, "r": 2, "sequential_rank": 3}
SEQ_LORA = {**HYDRA, "r": 0}


class OneLinear(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.lin = nn.Linear(13, 7, bias=bias).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def _layer(bias: bool = True, **options: object) -> tuple[PeftModel, LoraMoeLayer]:
    model = attach(OneLinear(bias), **{**HYDRA, "target_modules": ["lin"], **options}).double()
    layer = model.base_model.model.lin
    assert isinstance(layer, LoraMoeLayer)
    return model, layer


def _naive(x: Tensor, layer: LoraMoeLayer, scales: tuple[float, float]) -> Tensor:
    """``y0 + s_a B A x + s_b D C y0``, token by token."""
    a, b, c, d = (getattr(layer, f"molora_{letter}")["default"] for letter in "ABCD")
    base = layer.get_base_layer()
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        y0 = base.weight @ token if base.bias is None else base.weight @ token + base.bias
        rows.append(y0 + scales[0] * b @ (a @ token) + scales[1] * d @ (c @ y0))
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, (8, 16 / 3)),
        ({"scaling": "constant", "lora_alpha": 0.1}, (0.1, 0.1)),
        ({"r": 0}, (0, 16 / 3)),
        ({"sequential_rank": 11}, (8, 16 / 11)),
    ],
    ids=["alpha over r", "one scale", "SeqLoRA", "more ranks than outputs"],
)
def test_layer_equals_the_naive_reference(
    options: dict[str, object], scales: tuple[float, float], bias: bool, path: str
) -> None:
    model, layer = _layer(bias, **options)
    x = torch.randn(2, 5, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 5, 7, dtype=torch.float64)
    y, wanted = model(x), _naive(x, layer, scales)
    assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-13)
    leaves = [x, *(getattr(layer, f"molora_{letter}")["default"] for letter in "ABCD")]
    leaves = [leaf for leaf in leaves if leaf.numel()]
    for ours, naive in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        assert torch.allclose(ours, naive, rtol=1e-11, atol=1e-12 * float(naive.abs().max()))


def test_without_a_sequential_rank_it_is_peft_lora() -> None:
    inputs = inputs_for("bert")
    ours = attach(build("bert"), **{**HYDRA, "sequential_rank": 0}, lora_alpha=8)
    assert not any("molora_C" in name or "molora_D" in name for name, _ in ours.named_parameters())
    targets = sorted(ours.peft_config["default"].target_modules)
    theirs = get_peft_model(build("bert"), LoraConfig(r=2, lora_alpha=8, target_modules=targets))
    here, there = dict(ours.named_modules()), dict(theirs.named_modules())
    for target in targets:
        layer, lora = here[f"base_model.model.{target}"], there[f"base_model.model.{target}"]
        lora.lora_A["default"].weight.data.copy_(layer.molora_A["default"])
        lora.lora_B["default"].weight.data.copy_(layer.molora_B["default"])
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))


@pytest.mark.parametrize("options", [HYDRA, SEQ_LORA], ids=["Hydra", "SeqLoRA"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_life_of_an_adapter(name: str, options: dict[str, int], tmp_path: Path) -> None:
    """Starts at the base model, trains, is disabled, saved and loaded, all to the last bit."""
    inputs = inputs_for(name)
    base = logits(build(name), inputs)
    model = attach(build(name), **options, init_lora_weights=True)
    assert torch.equal(logits(model, inputs), base)
    plan = model.peft_config["default"].plan
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters()
    train_a_step(model, inputs)
    after = logits(model, inputs)
    assert not torch.equal(after, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    model.save_pretrained(tmp_path)
    again = reload(build(name), tmp_path)
    assert again.peft_config["default"].plan == plan
    assert torch.equal(logits(again, inputs), after)


@pytest.mark.parametrize("options", [HYDRA, SEQ_LORA], ids=["Hydra", "SeqLoRA"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_merged_equals_unmerged(name: str, options: dict[str, int]) -> None:
    """Weights and biases; taken out again they are the old ones to the last bit."""
    inputs = inputs_for(name)
    base = build(name).double()
    for module in base.modules():  # biases start at zero, where a merge that forgets them goes unseen
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.normal_(module.bias)
    model = attach(base, **options, scaling="constant", lora_alpha=0.5).double()
    frozen = {n: t.clone() for n, t in model.state_dict().items()}
    wanted = logits(model, inputs)
    exported = logits(merged_copy(model), inputs)
    assert torch.allclose(exported, wanted, rtol=1e-10, atol=1e-11)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model, inputs), wanted, rtol=1e-10, atol=1e-11)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, frozen[n])}
    biases = {n for n in frozen if n.endswith("base_layer.bias")}
    assert biases <= changed
    assert bool(biases) == (name != "llama")
    model.unmerge_adapter()
    assert all(torch.equal(t, frozen[n]) for n, t in model.state_dict().items())
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == set(build(name).state_dict())
    assert torch.allclose(logits(merged, inputs), wanted, rtol=1e-10, atol=1e-11)


def test_two_adapters_read_the_frozen_output() -> None:
    """Active together, unmerged and merged: no branch sees what another one adds."""
    model, layer = _layer()
    model.add_adapter("second", LoraMoeConfig(**SEQ_LORA, target_modules=["lin"], init_lora_weights=False))
    model.double()
    x = torch.randn(5, 13, dtype=torch.float64)
    base = layer.get_base_layer()(x)
    alone = []
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        alone.append(model(x) - base)
    model.base_model.set_adapter(["default", "second"])
    assert torch.allclose(model(x), base + alone[0] + alone[1], rtol=1e-12, atol=1e-13)
    model.merge_adapter(["second", "default"])
    assert torch.allclose(model(x), base + alone[0] + alone[1], rtol=1e-10, atol=1e-12)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer()(x), base)


def test_safe_merge_refuses_a_bias_that_is_not_finite() -> None:
    model, layer = _layer()
    weight = layer.get_base_layer().weight.detach().clone()
    layer.get_base_layer().bias.data[0] = float("inf")
    with pytest.raises(GuilomoError, match=r"not finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(reentrant: bool) -> None:
    def run(checkpointed: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = attach(build("llama"), **HYDRA, lora_dropout=0.2).train()
        if checkpointed:
            base = model.get_base_model()
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            base.enable_input_require_grads()
        torch.manual_seed(5)
        model(**inputs_for("llama")).loss.backward()
        return gradients(model)

    wanted, found = run(False), run(True)
    assert any("molora_D" in key for key in wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_dropout_of_the_sequential_branch() -> None:
    """Off in evaluation; in training right on average."""
    model, _ = _layer(r=0, lora_dropout=0.4)
    x = torch.randn(3, 13, dtype=torch.float64)
    model.eval()
    whole = model(x)
    model.train()
    runs = torch.stack([model(x).detach() for _ in range(800)])
    assert not torch.equal(runs[0], runs[1])
    assert ((runs.mean(0) - whole).abs() < 5 * runs.std(0) / len(runs) ** 0.5).all()


def test_patterns_leave_modules_out() -> None:
    model = attach(build("llama"), **HYDRA, rank_pattern={"q_proj": [], "v_proj": 0})
    plan = model.peft_config["default"].plan
    assert not plan["model.layers.0.self_attn.q_proj"].adapted
    assert plan["model.layers.0.self_attn.v_proj"].ranks == ()
    assert plan["model.layers.0.self_attn.v_proj"].sequential_rank == 3


def test_plain_lora_cannot_have_it() -> None:
    model = attach(build("bert"), **HYDRA)
    with pytest.raises(GuilomoError, match=r"sequential branch.*--to merged"):
        plain_lora(model, mean_gates(model, []))
    assert not any(m.supports_lora_conversion() for m in model.modules() if isinstance(m, LoraMoeLayer))


def test_a_search_is_refused() -> None:
    search = SearchConfig(max_experts=1, max_rank=2, top_k=1)
    with pytest.raises(GuilomoError, match=r"no plain mixture.*sequential_rank"):
        SearchMixture.of(attach(build("llama"), **HYDRA), search)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequential_rank": -1}, r"sequential_rank = -1.*at least 0"),
        ({"sequential_rank": 2}, r"sequential_rank = 2.*0 beside several experts.*num_experts=1"),
        ({"r": 0, "num_experts": 1, "top_k": 1}, r"r = 0.*at least 1"),
        ({**HYDRA, "rank_pattern": {"q_proj": [1, 1]}}, r"q_proj'.*sequential_rank = 3.*0 beside 2 experts"),
        (
            {**HYDRA, "allocation": Allocation({"lm_head": ModulePlan(32, 64, (2,), 1)})},
            r"sequential_rank = 3.*allocation has no such branch",
        ),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        get_peft_model(build("llama"), LoraMoeConfig(target_modules="all-linear", **options))
