"""One A for all experts (HydraLoRA, MoSLD), and DropConnect of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapter_tools import attach, gradients, logits, reload, train_a_step
from guilomo import Allocation, GuilomoError, LoraMoeConfig, ModulePlan
from guilomo.allocation import with_shared_a
from guilomo.export import mean_gates, plain_lora
from guilomo.layers.naive import naive_delta, naive_topk_weights
from guilomo.layers.paths import using
from guilomo.search import SearchConfig
from guilomo.search.mixture import SearchMixture
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(13, 7).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def _layer(**options: object) -> tuple[PeftModel, LoraMoeLayer]:
    given = {"target_modules": ["lin"], "shared_a": True, "r": 3, "balance_loss": None, **options}
    model = attach(OneLinear(), **given).double()
    layer = model.base_model.model.lin
    assert isinstance(layer, LoraMoeLayer)
    return model, layer


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("tokens", [1, 10, 150])
@pytest.mark.parametrize(("router", "top_k"), [("topk", 1), ("topk", 2), ("topk", 3), ("dense", 3)])
def test_layer_equals_the_naive_reference(router: str, top_k: int, tokens: int) -> None:
    """Outputs and gradients; the twin gives every expert a copy of A. With the dense router this is HydraLoRA."""
    model, layer = _layer(router=router, top_k=top_k)
    a, b, w = layer.molora_A["default"], layer.molora_B["default"], layer.molora_router["default"].weight
    assert tuple(a.shape) == (3, 13)
    x = torch.randn(2, tokens, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, tokens, 7, dtype=torch.float64)
    y = model(x)
    flat = x.reshape(-1, 13)
    delta = naive_delta(flat, a.repeat(3, 1), b, naive_topk_weights(flat @ w.T, top_k), [3] * 3, [16 / 3] * 3)
    wanted = layer.base_layer(x) + delta.view(y.shape)
    assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(model(x), wanted, rtol=1e-12, atol=1e-13)
    leaves = (x, a, b, w)
    for ours, naive in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        assert torch.allclose(ours, naive, rtol=1e-11, atol=1e-12 * float(naive.abs().max()))


def test_one_expert_is_peft_lora() -> None:
    inputs = inputs_for("llama")
    ours = attach(build("llama"), num_experts=1, top_k=1, lora_alpha=8, shared_a=True)
    targets = sorted(ours.peft_config["default"].target_modules)
    theirs = get_peft_model(build("llama"), LoraConfig(r=2, lora_alpha=8, target_modules=targets))
    here, there = dict(ours.named_modules()), dict(theirs.named_modules())
    for target in targets:
        layer, lora = here[f"base_model.model.{target}"], there[f"base_model.model.{target}"]
        lora.lora_A["default"].weight.data.copy_(layer.molora_A["default"])
        lora.lora_B["default"].weight.data.copy_(layer.molora_B["default"])
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))


@pytest.mark.parametrize("path", ["packed", "fused"])
def test_one_sample_of_a_for_all_experts_and_tokens(path: str) -> None:
    """Unit vectors as tokens and constant gates: the change is ``(sum w_e B_e) A~``, from which A~ can be solved."""
    model, layer = _layer(router="fixed", router_options={"weights": [0.5, 0.2, 0.3]}, drop_connect=0.4)
    a, b = layer.molora_A["default"].detach(), layer.molora_B["default"].detach()
    gates = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    mixed = (b.view(7, 3, 3) * gates[:, None]).sum(1) * 16 / 3
    tokens = torch.eye(13, dtype=torch.float64)
    model.train()
    with using(path), torch.no_grad():
        samples = []
        for _ in range(2):
            delta = (model(tokens) - layer.base_layer(tokens)).T
            sample = torch.linalg.lstsq(mixed, delta).solution
            assert torch.allclose(mixed @ sample, delta, atol=1e-12), "experts or tokens saw different samples"
            kept = (sample - a / 0.6).abs() < 1e-10
            assert (kept | (sample.abs() < 1e-10)).all()
            samples.append(kept)
        assert not torch.equal(*samples)
        assert all(0 < kept.sum() < kept.numel() for kept in samples)
        model.eval()
        assert torch.allclose((model(tokens) - layer.base_layer(tokens)).T, mixed @ a, atol=1e-12)


def test_samples_of_a_average_to_a() -> None:
    """20 000 samples; every entry lies within five standard errors of its mean."""
    _, layer = _layer(drop_connect=0.1)
    layer.train()
    count = 20_000
    with torch.no_grad():
        total = sum(layer.mixtures["default"].down() for _ in range(count))
    a = layer.molora_A["default"]
    error = (0.1 / 0.9 / count) ** 0.5
    assert ((total / count / a - 1).abs() < 5 * error).all()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same_sample(reentrant: bool) -> None:
    def run(checkpointed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = attach(build("llama"), shared_a=True, drop_connect=0.3, balance_coefficient=0.5).train()
        if checkpointed:
            base = model.get_base_model()
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            base.enable_input_require_grads()
        torch.manual_seed(5)
        loss = model(**inputs_for("llama")).loss
        loss.backward()
        return loss.detach(), gradients(model)

    loss, wanted = run(False)
    again, found = run(True)
    assert torch.equal(loss, again)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    inputs = inputs_for(name)
    base = logits(build(name), inputs)
    model = attach(build(name), shared_a=True, drop_connect=0.1)
    plan = model.peft_config["default"].plan
    assert all(module.shared_a for module in plan.adapted().values())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters()
    train_a_step(model, inputs)
    after = logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    model.save_pretrained(tmp_path)
    again = reload(build(name), tmp_path)
    assert again.peft_config["default"].plan == plan
    assert torch.equal(logits(again, inputs), after)


def test_merged_and_exported() -> None:
    inputs = inputs_for("gpt2")
    model = attach(
        build("gpt2").double(), router="fixed", router_options={"weights": [0.5, 0.2, 0.3]}, shared_a=True
    ).double()
    wanted = logits(model, inputs)
    export = plain_lora(model, mean_gates(model, []))
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraMoeLayer):
            pair = export.factors[name]
            assert torch.allclose(pair.b @ pair.a, layer.get_delta_weight("default"), rtol=1e-9, atol=1e-12)
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(logits(model, inputs), wanted, rtol=1e-10, atol=1e-12)
    model.unmerge_adapter()
    assert torch.allclose(logits(model, inputs), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_connect": 0.1}, r"drop_connect = 0\.1.*0 unless shared_a=True"),
        ({"drop_connect": 1.0, "shared_a": True}, r"drop_connect = 1\.0.*\[0, 1\)"),
        ({"shared_a": True, "rank_pattern": {"q_proj": [2, 3]}}, r"q_proj'.*ranks = \(2, 3\).*equal ranks"),
        (
            {"shared_a": True, "allocation": Allocation({"lm_head": ModulePlan(32, 64, (2, 2))})},
            r"shared_a = True.*'lm_head' an A for every expert.*with_shared_a",
        ),
    ],
)
def test_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        get_peft_model(build("llama"), LoraMoeConfig(target_modules="all-linear", **options))


def test_a_plan_brings_its_structure() -> None:
    plan = with_shared_a(Allocation({"lm_head": ModulePlan(32, 64, (2, 2, 2))}))
    model = attach(build("llama"), allocation=plan)
    assert tuple(model.get_base_model().lm_head.molora_A["default"].shape) == (plan["lm_head"].ranks[0], 32)


def test_a_search_is_refused() -> None:
    search = SearchConfig(max_experts=3, max_rank=2, top_k=2)
    model = attach(build("llama"), shared_a=True)
    with pytest.raises(GuilomoError, match=r"no plain mixture.*cannot be searched.*with_shared_a"):
        SearchMixture.of(model, search)
