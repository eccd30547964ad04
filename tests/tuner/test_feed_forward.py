"""Experts of whole feed-forwards (MixLoRA), against a twin that runs the model's own feed-forward once per expert."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapter_tools import attach, gradients, logits, reload, train_a_step
from guilomo import Allocation, GuilomoError, LoraMoeConfig, ModulePlan
from guilomo.export import mean_gates, merged_copy, plain_lora
from guilomo.layers.naive import naive_topk_weights
from guilomo.search import SearchConfig
from guilomo.search.mixture import SearchMixture
from guilomo.tuner import FeedForwardLayer, LoraMoeLayer, context_of
from tiny_models import build, inputs_for

FEED_FORWARDS = {
    "llama": ["gate_proj", "up_proj", "down_proj"],
    "gemma": ["gate_proj", "up_proj", "down_proj"],
    "bert": ["intermediate.dense", "output.dense"],
    "gpt2": ["c_fc", "c_proj"],
    "vit": ["fc1", "fc2"],
}
"""The linears of a block in each tiny model, in the order of running."""


def _attach(base: nn.Module, **options: Any) -> PeftModel:
    return attach(base, **{"feed_forward_experts": True, "balance_loss": None, **options})


def _blocks(model: PeftModel) -> dict[str, list[FeedForwardLayer]]:
    """The layers of each block, the routing one first and the summing one last."""
    found: dict[str, list[FeedForwardLayer]] = {}
    for layer in model.modules():
        if isinstance(layer, FeedForwardLayer):
            found.setdefault(layer.molora_plan["default"].block, []).append(layer)
    order = ("route", "in", "out")
    return {b: sorted(ls, key=lambda m: order.index(m.molora_plan["default"].role)) for b, ls in found.items()}


class _OneExpert(nn.Module):
    """The frozen linear with the low-rank pair of one expert; reads the parameters of the layer under test."""

    def __init__(self, layer: FeedForwardLayer, expert: int) -> None:
        super().__init__()
        self.layer, self.expert = layer, expert

    def forward(self, x: Tensor) -> Tensor:
        plan = self.layer.molora_plan["default"]
        start, rank = sum(plan.ranks[: self.expert]), plan.ranks[self.expert]
        a = self.layer.packed_a("default")[start : start + rank]
        b = self.layer.molora_B["default"][:, start : start + rank]
        y = self.layer.base_layer(x)
        return y + 16 / rank * (x @ a.T @ b.T) if rank else y


class _Twin(nn.Module):
    """``sum_e w_e FFN_e(x)`` over all experts, with any feed-forward that a function of linears gives."""

    def __init__(self, layers: list[FeedForwardLayer], run: Any, top_k: int) -> None:
        super().__init__()
        self.layers, self.run, self.top_k = layers, run, top_k

    def forward(self, x: Tensor) -> Tensor:
        router = self.layers[0].molora_router["default"]
        scores = x.reshape(-1, x.shape[-1]) @ router.weight.T
        weights = naive_topk_weights(scores, self.top_k).view(*x.shape[:-1], -1)
        outputs = [self.run([_OneExpert(layer, e) for layer in self.layers], x) for e in range(weights.shape[-1])]
        return sum(weights[..., e : e + 1] * output for e, output in enumerate(outputs))


def _gated(linears: list[nn.Module], x: Tensor) -> Tensor:
    gate, up, down = linears
    return down(nn.functional.silu(gate(x)) * up(x))


def _plain(linears: list[nn.Module], x: Tensor) -> Tensor:
    into, out = linears
    return out(nn.functional.gelu(into(x)))


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _twin_of(name: str, model: PeftModel, top_k: int) -> nn.Module:
    """The same base model, whose feed-forwards run once for every expert; parameters are shared with `model`."""
    base = model.get_base_model()
    memo = {id(t): t for t in [*base.parameters(), *base.buffers()]}
    memo |= {id(m): m for m in base.modules() if isinstance(m, LoraMoeLayer)}
    twin = copy.deepcopy(base, memo)
    blocks = _blocks(model)
    for block, layers in blocks.items():
        run = _gated if len(layers) == 3 else _plain
        if name == "bert":
            twin.get_submodule(block).intermediate = _Twin(layers, run, top_k)
            twin.get_submodule(f"{block}.output").dense = _Nothing()
        else:
            parent, _, last = block.rpartition(".")
            setattr(twin.get_submodule(parent), last, _Twin(layers, run, top_k))
    return twin


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("ranks", [2, [3, 1, 2]])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_equals_a_feed_forward_per_expert(name: str, ranks: Any, top_k: int) -> None:
    """Outputs and gradients of a whole model in float64."""
    patterns = {".*(_proj|intermediate.dense|layer.\\d+.output.dense)": ranks} if isinstance(ranks, list) else {}
    base = build(name).double()
    model = _attach(base, target_modules=FEED_FORWARDS[name], top_k=top_k, rank_pattern=patterns)
    model = model.double().train()
    twin = _twin_of(name, model, top_k).train()
    inputs = inputs_for(name)
    ours, naive = model(**inputs), twin(**inputs)
    assert torch.allclose(ours.logits, naive.logits, rtol=1e-10, atol=1e-12)
    assert torch.allclose(logits(model, inputs), logits(twin, inputs), rtol=1e-10, atol=1e-12)
    leaves = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 2)[-2 if "router" not in n else -3] for n in leaves} >= {"molora_A", "molora_B"}
    found = torch.autograd.grad(ours.loss, list(leaves.values()))
    wanted = torch.autograd.grad(naive.loss, list(leaves.values()))
    for key, mine, other in zip(leaves, found, wanted, strict=True):
        assert other.abs().max() > 0, key
        assert torch.allclose(mine, other, rtol=1e-8, atol=1e-10 * float(other.abs().max())), key


class OneBlock(nn.Module):
    """A feed-forward with odd sizes and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(13, 11), nn.Linear(11, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = OneBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


@pytest.mark.parametrize("options", [{"router": "dense"}, {"shared_a": True}, {"top_k": 3, "num_experts": 5}, {}])
@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 3, 4)])
def test_one_block(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Biases, any number of leading dimensions, and other routers; the gradient of x too."""
    model = _attach(Model().double(), target_modules=["fc1", "fc2"], **options).double()
    config = model.peft_config["default"]
    top_k = config.plan["mlp.fc1"].top_k
    twin = _Twin(_blocks(model)["mlp"], _plain, top_k)
    x = torch.randn(*shape, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*shape, 7, dtype=torch.float64)
    y, wanted = model(x), twin(x)
    assert torch.allclose(y, wanted, rtol=1e-11, atol=1e-12)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    for mine, other in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11 * float(other.abs().max()))


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_starts_at_the_base_model(name: str) -> None:
    """B = 0: the frozen feed-forward to the last bit, since the weights sum to 1."""
    inputs = inputs_for(name)
    for router in ("topk", "dense"):
        model = _attach(build(name), router=router, init_lora_weights=True)
        assert torch.equal(logits(model, inputs), logits(build(name), inputs))


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_life_of_an_adapter(name: str, tmp_path: Path) -> None:
    """Experts in the feed-forwards, plain LoRA elsewhere; trained, disabled, saved and loaded, all to the last bit."""
    inputs = inputs_for(name)
    base = logits(build(name), inputs)
    model = _attach(build(name), balance_loss="switch_per_slot", balance_coefficient=0.01)
    plan = model.peft_config["default"].plan
    assert len(_blocks(model)) == 2
    for module, planned in plan.adapted().items():
        inside = any(module.endswith(part) for part in FEED_FORWARDS[name]) and "attention" not in module
        inside = inside and ".attn." not in module
        assert planned.experts == (3 if inside else 1), module
    routers = sum("molora_router" in n for n, p in model.named_parameters() if p.requires_grad)
    assert routers == 2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters()
    train_a_step(model, inputs)
    after = logits(model, inputs)
    assert not torch.equal(after, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = reload(build(name), tmp_path, low_cpu_mem_usage=low_memory)
        assert again.peft_config["default"].plan == plan
        assert torch.equal(logits(again, inputs), after)
    assert torch.equal(logits(copy.deepcopy(model), inputs), after)


def test_one_expert_is_peft_lora() -> None:
    inputs = inputs_for("llama")
    ours = _attach(build("llama"), num_experts=1, top_k=1, lora_alpha=8)
    assert not _blocks(ours)
    targets = sorted(ours.peft_config["default"].target_modules)
    theirs = get_peft_model(build("llama"), LoraConfig(r=2, lora_alpha=8, target_modules=targets))
    here, there = dict(ours.named_modules()), dict(theirs.named_modules())
    for target in targets:
        layer, lora = here[f"base_model.model.{target}"], there[f"base_model.model.{target}"]
        lora.lora_A["default"].weight.data.copy_(layer.molora_A["default"])
        lora.lora_B["default"].weight.data.copy_(layer.molora_B["default"])
    assert torch.equal(logits(ours, inputs), logits(theirs, inputs))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_recomputation_changes_nothing(name: str, reentrant: bool) -> None:
    """Loss, gradients and balance losses; and statistics are counted once."""

    def run(checkpointed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = _attach(build(name), balance_loss="switch_per_slot", balance_coefficient=0.5, lora_dropout=0.1).train()
        base = model.get_base_model()
        context = context_of(base)
        context.record = True
        if checkpointed:
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
            base.enable_input_require_grads()
        torch.manual_seed(5)
        inputs = inputs_for(name)
        loss = model(**inputs).loss
        loss.backward()
        assert len(context.statistics) == 2
        assert all(s.tokens == inputs["attention_mask"].sum() for s in context.statistics.values())
        assert all(s.counts.sum() == 2 * s.tokens for s in context.statistics.values())
        return loss.detach(), gradients(model)

    (loss, wanted), (again, found) = run(False), run(True)
    assert torch.equal(loss, again)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_balance_loss_is_mixtrals() -> None:
    """Once for every block: the gradient of ``task loss + c * E * sum_e f_e P_e`` with f per slot, summed by hand."""
    options = {"balance_loss": "switch_per_slot", "balance_coefficient": 0.5, "balance_reduction": "sum"}
    torch.manual_seed(0)
    model = _attach(build("llama"), **options).double().train()
    inputs = inputs_for("llama")
    model(**inputs).loss.backward()
    found = gradients(model)
    torch.manual_seed(0)
    plain = _attach(build("llama")).double().train()
    seen: list[Tensor] = []
    for layers in _blocks(plain).values():
        layers[0].register_forward_pre_hook(
            lambda layer, args: seen.append(layer.molora_router["default"].logits(args[0]))
        )
    loss = plain(**inputs).loss
    real = inputs["attention_mask"].bool()
    for scores in seen:
        tokens = scores[real]
        probabilities = tokens.softmax(-1)
        kept = torch.zeros_like(probabilities).scatter(-1, tokens.topk(2, -1).indices, 1.0)
        loss = loss + 0.5 * 3 * (kept.mean(0) * probabilities.mean(0)).sum()
    loss.backward()
    for key, gradient in gradients(plain).items():
        assert torch.allclose(found[key], gradient, rtol=1e-8, atol=1e-10 * float(gradient.abs().max())), key


def test_generate_with_and_without_cache() -> None:
    model = _attach(build("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_B" in name:
                parameter.normal_(std=1.0)
    prompt = {k: v for k, v in inputs_for("llama").items() if k != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    model.eval()
    cached = model.generate(**prompt, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))


def test_a_row_does_not_see_its_batch() -> None:
    inputs = {k: v for k, v in inputs_for("llama").items() if k != "labels"}
    model = _attach(build("llama")).double().eval()
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        assert torch.allclose(alone[0], together[row], rtol=1e-10, atol=1e-12)


def test_bfloat16() -> None:
    """Half-precision models run and stay near the float32 ones; experts may be float32."""
    inputs = inputs_for("llama")
    torch.manual_seed(0)
    whole = logits(_attach(build("llama")), inputs)
    torch.manual_seed(0)
    half = _attach(build("llama")).bfloat16()
    assert logits(half, inputs).dtype == torch.bfloat16
    assert (logits(half, inputs).float() - whole).abs().mean() < 0.05 * whole.abs().mean()
    torch.manual_seed(0)
    mixed = _attach(build("llama").bfloat16())
    train_a_step(mixed, inputs)
    assert logits(mixed, inputs).dtype == torch.bfloat16


def test_blocks_named_by_the_user() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleDict({"first": nn.Linear(5, 6), "second": nn.Linear(6, 5)})

        def forward(self, x: Tensor) -> Tensor:
            return self.block["second"](self.block["first"](x).relu())

    model = _attach(Named(), target_modules=["first", "second"], feed_forward_blocks=[["first", "second"]])
    plan = model.peft_config["default"].plan
    assert [plan[f"block.{n}"].role for n in ("first", "second")] == ["route", "out"]
    swapped = _attach(Named(), target_modules=["first", "second"], feed_forward_blocks=[["second", "first"]])
    with pytest.raises(GuilomoError, match=r"'block\.first' ran before.*order in which they run"):
        swapped(torch.randn(2, 5))


def test_what_is_not_elementwise_is_refused() -> None:
    class Odd(OneBlock):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.fc1(x)[:1])

    model = _attach(nn.Sequential(Odd()), target_modules=["fc1", "fc2"])
    with pytest.raises(GuilomoError, match=r"2 chosen experts of 4 rows.*not elementwise"):
        model(torch.randn(4, 13))


def test_two_adapters() -> None:
    """Switched, each as alone; not at once, and not of two kinds in one linear."""
    inputs = inputs_for("llama")
    model = _attach(build("llama"))
    first = logits(model, inputs)
    config = {"target_modules": "all-linear", "init_lora_weights": False}
    model.add_adapter("second", LoraMoeConfig(**config, num_experts=4, r=1, feed_forward_experts=True))
    assert torch.equal(logits(model, inputs), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model, inputs), first)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(GuilomoError, match=r"2 active adapters.*set_adapter"):
        logits(model, inputs)
    before = set(model.state_dict())
    with pytest.raises(GuilomoError, match=r"adapter of another kind"):
        model.add_adapter("third", LoraMoeConfig(**config))
    assert set(model.state_dict()) == before, "refused before anything is touched"


def test_no_merge_no_export_no_search() -> None:
    model = _attach(build("llama"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(GuilomoError, match=r"cannot be merged.*behind the nonlinearity"):
            merge()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    for export in (lambda: plain_lora(model, {}), lambda: mean_gates(model, []), lambda: merged_copy(model)):
        with pytest.raises(GuilomoError, match=r"mlp' are whole feed-forwards.*nothing to export"):
            export()
    assert not any(m.supports_lora_conversion() for m in model.modules() if isinstance(m, FeedForwardLayer))
    with pytest.raises(GuilomoError, match=r"no plain mixture.*feed-forward block.*cannot be searched"):
        SearchMixture.of(model, SearchConfig(max_experts=3, max_rank=2, top_k=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, r"feed_forward_experts = True.*no adapted module.*blocks"),
        ({"target_modules": ["gate_proj", "down_proj"]}, r"mlp' is adapted in part.*up_proj have none"),
        ({"rank_pattern": {"up_proj": []}}, r"mlp' is adapted in part.*up_proj have none"),
        ({"rank_pattern": {"up_proj": [1, 1]}}, r"block '\S+mlp' = \[\(2, 2\), \(3, 2\)\].*the same"),
        ({"top_k": 1}, r"top_k of \S+ = 1.*at least 2 in a feed-forward block.*sum to 1"),
        ({"feed_forward_blocks": [["gate_proj"]]}, r"feed_forward_blocks = \['gate_proj'\].*at least two names"),
        (
            {"allocation": Allocation({"lm_head": ModulePlan(32, 64, (2, 2))})},
            r"feed_forward_experts = True.*allocation has no feed-forward block",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        _attach(build("llama"), **options)
