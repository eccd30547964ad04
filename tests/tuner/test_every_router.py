"""What holds for every router: the layer is the naive mixture at its weights, and models live with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapter_tools import attach, gradients, logits, reload, train_a_step
from guilomo import GuilomoError, LoraMoeConfig
from guilomo.layers.naive import naive_delta
from guilomo.layers.paths import using
from guilomo.layers.routers import ROUTERS, cost_of_router
from guilomo.search import SearchConfig, search_sized
from guilomo.search.mixture import SearchMixture
from guilomo.tuner import LoraMoeLayer
from guilomo.tuner.biases import biased_routers
from router_cases import CASES, MERGEABLE, TASKED, TASKS, options_of, with_tasks
from tiny_models import build, inputs_for, llama

EVERY = pytest.mark.parametrize("router", CASES)


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(13, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)


def _layers(model: nn.Module) -> Iterator[LoraMoeLayer]:
    return (m for m in model.modules() if isinstance(m, LoraMoeLayer))


def _move(model: PeftModel) -> PeftModel:
    """Parameters away from a start at which much is zero or equal."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def _model(router: str, mode: str = "none", **options: object) -> PeftModel:
    torch.manual_seed(0)
    model = _move(attach(build("llama"), **options_of(router, **options))).train()
    if mode != "none":
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        base.enable_input_require_grads()
    return model


def test_every_router_is_tested() -> None:
    assert set(CASES) == set(ROUTERS)


@EVERY
def test_layer_equals_the_naive_reference(router: str, path: str) -> None:
    torch.manual_seed(3)
    ranks = [1, 1, 1] if router == "flylora" else [3, 1, 5]
    options = options_of(router, rank_pattern={"lin": ranks}, balance_loss=None, router_loss_coefficient=0.0)
    model = _move(attach(OneLinear(), target_modules=["lin"], **options)).double()
    layer = next(_layers(model))
    a, b = layer.molora_A["default"], layer.molora_B["default"]
    x = torch.randn(3, 5, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 5, 7, dtype=torch.float64)
    keyword = {"router_task_ids": TASKS} if router in TASKED else {}
    y = model(x, **keyword)
    routing = layer.routing(x)
    scales = model.peft_config["default"].plan.scales("lin")
    delta = naive_delta(x.reshape(-1, 13), a, b, routing.weights.reshape(-1, 3), ranks, scales)
    wanted = layer.base_layer(x) + delta.reshape(3, 5, 7)
    assert torch.allclose(y, wanted, rtol=1e-12, atol=1e-13)
    assert (y - layer.base_layer(x)).abs().max() > 1e-3
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    ours = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    naive = torch.autograd.grad(wanted, leaves, dy, allow_unused=True)
    for one, other in zip(ours, naive, strict=True):
        assert (
            (one is None or not one.any())
            if other is None
            else torch.allclose(one, other, rtol=1e-11, atol=1e-12 * float(other.abs().max()))
        )


@EVERY
def test_starts_at_the_base_model_and_is_it_when_disabled(router: str) -> None:
    """To the last bit, in training too."""
    inputs = with_tasks(router, inputs_for("llama"))
    base = build("llama")
    wanted = logits(base, inputs_for("llama"))
    model = attach(build("llama"), **options_of(router, init_lora_weights=True))
    assert torch.equal(logits(model, inputs), wanted)
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).logits, base.train()(**inputs_for("llama")).logits)
    _move(model)
    assert not torch.equal(logits(model, inputs), wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), wanted)


@EVERY
def test_one_expert_is_peft_lora(router: str) -> None:
    """Whatever the router, a single expert has gate 1."""
    given = {"router_options": {"weights": [1.0]}} if router == "fixed" else {}
    options = options_of(router, num_experts=1, top_k=1, r=2, lora_alpha=8, **given)
    ours = attach(build("llama"), **options)
    targets = sorted(ours.peft_config["default"].target_modules)
    theirs = get_peft_model(build("llama"), LoraConfig(r=2, lora_alpha=8, target_modules=targets))
    there = dict(theirs.named_modules())
    for layer in _layers(ours):
        lora = there[f"base_model.model.{layer.name}"]
        lora.lora_A["default"].weight.data.copy_(layer.molora_A["default"])
        lora.lora_B["default"].weight.data.copy_(layer.molora_B["default"])
    inputs = inputs_for("llama")
    assert torch.equal(logits(ours, with_tasks(router, inputs)), logits(theirs, inputs))


@EVERY
def test_weights_are_zero_where_not_chosen(router: str) -> None:
    model = _model(router)
    layer = next(_layers(model))
    layer.context.task = TASKS
    for training in (True, False):
        routing = layer.train(training).routing(torch.randn(3, 4, 32))
        assert not routing.weights[~routing.chosen].any()
        assert routing.chosen.any(-1).all()
        assert routing.weights.dtype == torch.float32
        assert routing.logits.shape == routing.weights.shape == (3, 4, 3)


@EVERY
def test_saved_is_loaded(router: str, tmp_path: Path) -> None:
    inputs = with_tasks(router, inputs_for("llama"))
    model = _model(router)
    train_a_step(model, inputs)
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = reload(build("llama"), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(again, inputs), wanted)
        assert again.peft_config["default"].router_options == model.peft_config["default"].router_options
    assert torch.equal(logits(copy.deepcopy(model), inputs), wanted)


@EVERY
def test_an_adapter_may_change_its_name(router: str, tmp_path: Path) -> None:
    """PEFT strips and adds the name in every key."""
    inputs = with_tasks(router, inputs_for("llama"))
    model = attach(build("llama"), adapter="mine", **options_of(router))
    model.save_pretrained(tmp_path)
    again = reload(build("llama"), tmp_path / "mine", adapter_name="yours")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@EVERY
def test_a_few_steps_learn(router: str) -> None:
    inputs = with_tasks(router, inputs_for("llama"))
    torch.manual_seed(0)
    model = attach(build("llama"), **options_of(router, init_lora_weights=True)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@EVERY
def test_what_is_trained_is_what_the_plan_counts(router: str) -> None:
    model = attach(build("llama"), **options_of(router, rank_pattern={"q_proj": [2], "o_proj": [1, 1, 1]}))
    if router == "flylora":
        model = attach(build("llama"), **options_of(router, rank_pattern={"q_proj": [1]}))
    config = model.peft_config["default"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert config.plan.parameters(cost_of_router(config.router, config.router_options)) == trained


@EVERY
def test_padding_content_changes_no_gradient(router: str) -> None:
    inputs = with_tasks(router, inputs_for("llama"))
    other = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 5)}
    found = []
    for given in (inputs, other):
        model = _model(router, z_loss_coefficient=0.0 if router in UNBALANCED else 0.1)
        loss = model(**given).loss
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach(), **dict(model.named_buffers())})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


UNBALANCED = frozenset(name for name, kind in ROUTERS.items() if not kind.balanced)


@EVERY
def test_a_row_does_not_see_its_batch(router: str) -> None:
    inputs = {k: v for k, v in with_tasks(router, inputs_for("llama")).items() if k != "labels"}
    model = _model(router).double().eval()
    together = model(**inputs).logits
    for row in range(3):
        alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        assert torch.allclose(alone[0], together[row], rtol=1e-9, atol=1e-11)


@EVERY
def test_the_order_of_the_experts_does_not_matter(router: str) -> None:
    """Rank rows, router rows and all that counts experts permuted together give the same outputs."""
    if router == "fixed":
        pytest.skip("its weights are options")
    inputs = with_tasks(router, inputs_for("llama"))
    model = _model(router).double().eval()
    wanted = logits(model, inputs)
    order = torch.tensor([2, 0, 1])
    rank = 1 if router == "flylora" else 2
    rows = (order[:, None] * rank + torch.arange(rank)).flatten()
    with torch.no_grad():
        for layer in _layers(model):
            layer.molora_A["default"].copy_(layer.molora_A["default"][rows].clone())
            layer.molora_B["default"].copy_(layer.molora_B["default"][:, rows].clone())
            for name, values in layer.molora_router["default"].state_dict().items():
                if name in {"weight", "up", "bias"}:
                    values.copy_(values[order].clone())
            for name, values in layer.molora_shared.state_dict().items():
                if name.endswith("scores"):
                    values.copy_(values[:, order].clone())
    assert torch.allclose(logits(model, inputs), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("router", ["dense", "fixed", "task", "lora_mixer", "top_p"])
def test_an_expert_split_into_two_halves_changes_nothing(router: str, path: str) -> None:
    """Where all experts take part, one of weight p is two copies of weight p / 2."""
    options = options_of(router, target_modules=["lin"], balance_loss=None, router_loss_coefficient=0.0)
    if router == "top_p":
        options["router_options"] = {"mass": 1.0}
    one = attach(OneLinear(), **{**options, "rank_pattern": {"lin": [3, 1, 5]}}).double().train()
    if router == "fixed":
        options["router_options"] = {"weights": [0.25, 0.25, 0.2, 0.3]}
    two = attach(OneLinear(), **{**options, "rank_pattern": {"lin": [3, 3, 1, 5]}}).double().train()
    before, after = next(_layers(one)), next(_layers(two))
    a, b = before.molora_A["default"], before.molora_B["default"]
    x = torch.randn(3, 5, 13, dtype=torch.float64)
    x[..., -1] = 1.0
    with torch.no_grad():
        after.base_layer.load_state_dict(before.base_layer.state_dict())
        after.molora_A["default"].copy_(torch.cat([a[:3], a]))
        after.molora_B["default"].copy_(torch.cat([b[:, :3], b], dim=1))
        if router == "task":
            before.molora_router["default"].embedding[:, -1] = 1.0
            after.molora_router["default"].embedding.copy_(before.molora_router["default"].embedding)
        if router != "fixed":
            scores = before.molora_router["default"].weight
            halved = after.molora_router["default"].weight
            halved.copy_(torch.cat([scores[:1], scores]))
            halved[:2, -1] -= math.log(2)  # the last number that they read is 1: log p - log 2
    keyword = {"router_task_ids": TASKS} if router in TASKED else {}
    wanted = one(x, **keyword)
    assert (wanted - before.base_layer(x)).abs().max() > 1e-3
    assert torch.allclose(two(x, **keyword), wanted, rtol=1e-11, atol=1e-12)


@EVERY
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_recomputation_changes_nothing(router: str, mode: str) -> None:
    inputs = with_tasks(router, inputs_for("llama"))
    found = []
    for how in ("none", mode):
        model = _model(router, how)
        torch.manual_seed(7)
        loss = model(**inputs).loss
        loss.backward()
        found.append({**gradients(model), "loss": loss.detach(), **dict(model.named_buffers())})
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        if "molora_shared" in name:  # summed over modules, block by block in one way and at once in the other
            assert torch.allclose(found[1][name], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())), name
        else:
            assert torch.equal(found[1][name], wanted), name


@EVERY
def test_packed_and_fused_agree_in_a_model(router: str) -> None:
    inputs = with_tasks(router, inputs_for("llama"))
    found = []
    for path in ("packed", "fused"):
        with using(path):
            model = _model(router).double()
            torch.manual_seed(7)
            model(**inputs).loss.backward()
            found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-8, atol=1e-10 * float(gradient.abs().max())), name


@EVERY
def test_half_precision(router: str) -> None:
    """Routing is made in float32 whatever the model is held in."""
    inputs = with_tasks(router, inputs_for("llama"))
    model = attach(build("llama").bfloat16(), **options_of(router)).train()
    model(**inputs).loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer looks, nobody else
@pytest.mark.parametrize("router", ["sparsegen", "hmora", "loss_free"])
def test_compiled_training(router: str) -> None:
    """In one graph, with what the router's losses and counts say."""
    torch._dynamo.reset()
    inputs = with_tasks(router, inputs_for("llama"))
    torch.manual_seed(0)
    model = _move(attach(llama(num_hidden_layers=1), **options_of(router))).train()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(7)
        run(**inputs).loss.backward()
        found.append({**gradients(model), **{str(i): r.take_counts() for i, r in enumerate(biased_routers(model))}})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, wanted in found[0].items():
        assert (found[1][name] - wanted).abs().max() <= 1e-6, name


@pytest.mark.parametrize("router", sorted(set(CASES) - MERGEABLE))
def test_merging_is_refused(router: str) -> None:
    with pytest.raises(GuilomoError, match=r"cannot be merged.*router='fixed'"):
        _model(router).merge_adapter()


@EVERY
def test_a_search_says_what_would_work(router: str) -> None:
    config = SearchConfig(max_experts=3, max_rank=1 if router == "flylora" else 2, steps=4)
    if not ROUTERS[router].searchable:
        with pytest.raises(GuilomoError, match=rf"router = '{router}' is not usable in a search.*topk, dense, fixed"):
            _search(router, config)
    else:
        assert _search(router, config).options.router == router


def _search(router: str, config: SearchConfig) -> SearchMixture:
    options = options_of(router, target_modules="all-linear")
    mixture = search_sized(config, **options)
    return SearchMixture.of(get_peft_model(build("llama"), mixture), config)


@pytest.mark.parametrize("router", sorted(UNBALANCED))
def test_losses_that_do_nothing_are_refused(router: str) -> None:
    for options, field in (({}, "balance_loss"), ({"balance_loss": None, "z_loss_coefficient": 0.1}, "z_loss")):
        with pytest.raises(GuilomoError, match=rf"{field}.*router='{router}'.*Set"):
            LoraMoeConfig(router=router, **options)
