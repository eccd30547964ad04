"""Selection biases in a model: moved once per step, by real tokens of training passes, alike in all processes."""

from __future__ import annotations

from pathlib import Path

import bias_jobs
import pytest
import torch
from bias_jobs import PROCESSES, STEPS, biases, mixture, rows_of
from peft import PeftModel

from adapter_tools import attach, gradients, logits
from guilomo import GuilomoError
from guilomo.adapters import train_only
from guilomo.tuner import LoraMoeLayer, update_router_biases
from guilomo.tuner.biases import biased_routers
from router_cases import options_of
from tiny_models import build, inputs_for

INPUTS = inputs_for("llama")
BOTH = pytest.mark.parametrize("router", ["loss_free", "flylora"])


def _model(router: str, mode: str = "none") -> PeftModel:
    torch.manual_seed(0)
    model = attach(build("llama"), **options_of(router)).train()
    if mode != "none":
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        base.enable_input_require_grads()
    return model


def _counts(model: PeftModel) -> torch.Tensor:
    return torch.stack([router.take_counts() for router in biased_routers(model)])


@BOTH
@pytest.mark.parametrize("mode", ["none", "non-reentrant", "reentrant"])
def test_every_real_token_is_counted_once(router: str, mode: str) -> None:
    model = _model(router, mode)
    for _ in range(2):  # two micro-batches of a step
        model(**INPUTS).loss.backward()
    counts = _counts(model)
    assert counts.shape == (14, 3)
    assert (counts.sum(1) == 2 * 2 * INPUTS["attention_mask"].sum()).all()
    assert len({tuple(row) for row in counts.tolist()}) > 1


@BOTH
def test_evaluation_counts_nothing_and_moves_nothing(router: str) -> None:
    model = _model(router).eval()
    before = biases(model)
    model(**INPUTS)
    with torch.no_grad():
        model(**INPUTS)
    update_router_biases(model)
    assert not _counts(model).any()
    assert all(torch.equal(b, before[n]) for n, b in biases(model).items())


@BOTH
def test_padding_content_moves_no_bias(router: str) -> None:
    found = []
    for ids in (INPUTS["input_ids"], INPUTS["input_ids"].masked_fill(INPUTS["attention_mask"] == 0, 5)):
        model = _model(router)
        model(**{**INPUTS, "input_ids": ids})
        found.append(_counts(model))
    assert torch.equal(*found)


@BOTH
def test_an_update_moves_each_bias_by_its_rate(router: str) -> None:
    model = _model(router)
    model(**INPUTS)
    update_router_biases(model)
    moved = torch.stack(list(biases(model).values()))
    assert all(abs(value) in (0.0, pytest.approx(0.1)) for value in moved.flatten().tolist())
    assert moved.any()
    update_router_biases(model)  # nothing was counted since
    assert torch.equal(torch.stack(list(biases(model).values())), moved)
    outputs = logits(model, INPUTS)
    for b in biased_routers(model):
        b.bias.zero_()
    assert not torch.equal(logits(model, INPUTS), outputs)


def test_without_such_routers_nothing_happens() -> None:
    model = attach(build("llama"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    update_router_biases(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.slow
def test_all_processes_agree_and_find_what_one_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(bias_jobs.data_parallel, args=(tmp_path,), nprocs=PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    model = mixture()
    for _ in range(STEPS):
        for rank in range(PROCESSES):
            for _ in range(2):
                model(**rows_of(rank))
        update_router_biases(model)
    wanted = biases(model)
    assert any(b.any() for b in wanted.values())
    for name, bias in wanted.items():
        assert torch.equal(first[name], bias)
        assert torch.equal(second[name], bias)


def test_flylora_trains_b_alone_and_passes_the_gradient_on() -> None:
    """The released training code cuts the gradient of x at the adapter, which starves the layers below."""
    model = _model("flylora")
    model(**INPUTS).loss.backward()
    found = gradients(model)
    assert found
    assert all("molora_B" in name for name in found)
    layer = next(m for m in model.modules() if isinstance(m, LoraMoeLayer))
    assert layer.molora_A["default"].grad is None
    x = torch.randn(2, 5, 32, requires_grad=True)
    y = layer(x) - layer.base_layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.any()
    chosen = layer.routing(x.detach()).weights
    scale = model.peft_config["default"].plan.scales(layer.name)[0]
    wanted = (scale * chosen * layer.molora_B["default"].sum(0)) @ layer.molora_A["default"]
    assert torch.allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_flylora_saves_no_projection_and_finds_it_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = _model("flylora")
    model.save_pretrained(tmp_path)
    assert not any("molora_A" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(
            build("llama"), str(tmp_path), low_cpu_mem_usage=low_memory, is_trainable=True
        )
        for ours, theirs in zip(_layers(model), _layers(again), strict=True):
            assert torch.equal(ours.molora_A["default"], theirs.molora_A["default"])
            assert not theirs.molora_A["default"].requires_grad
            assert theirs.molora_B["default"].requires_grad


def _layers(model: PeftModel) -> list[LoraMoeLayer]:
    return [m for m in model.modules() if isinstance(m, LoraMoeLayer)]


def test_flylora_in_bfloat16_is_the_same_projection(tmp_path: Path) -> None:
    model = attach(build("llama").bfloat16(), **options_of("flylora"))
    exact = attach(build("llama"), **options_of("flylora"))
    for ours, theirs in zip(_layers(model), _layers(exact), strict=True):
        assert torch.equal(ours.molora_A["default"].float(), theirs.molora_A["default"])


def test_flylora_with_all_ranks_is_lora_with_a_frozen_projection() -> None:
    model = attach(build("llama").double(), **options_of("flylora", top_k=3)).double()
    layer = _layers(model)[0]
    x = torch.randn(4, 32, dtype=torch.float64)
    a, b = layer.molora_A["default"], layer.molora_B["default"]
    scale = model.peft_config["default"].plan.scales(layer.name)[0]
    assert torch.allclose(layer(x), layer.base_layer(x) + scale * x @ a.T @ b.T, rtol=1e-11)


def test_flylora_adapters_of_one_projection_average_exactly() -> None:
    """Where all ranks are chosen, what adapters of one seed change has the mean of their B as its mean."""

    def change(model: PeftModel, x: torch.Tensor) -> torch.Tensor:
        layer = _layers(model)[0]
        return layer(x) - layer.base_layer(x)

    x = torch.randn(4, 32, dtype=torch.float64)
    for seeds, exact in (((0, 0), True), ((0, 1), False)):
        tasks = [
            attach(build("llama").double(), **options_of("flylora", top_k=3, router_options={"seed": s})).double()
            for s in seeds
        ]
        wanted = (change(tasks[0], x) + change(tasks[1], x)) / 2
        merged, other = (_layers(model)[0].molora_B["default"] for model in tasks)
        merged.data.add_(other.data).div_(2)
        assert torch.allclose(change(tasks[0], x), wanted, rtol=1e-10, atol=1e-12) == exact


def test_flylora_parameters() -> None:
    """r d_out in every module: neither A nor a router."""
    model = attach(build("llama"), **options_of("flylora"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(3 * m.out_features for m in _layers(model))


def test_flylora_stays_frozen_when_adapters_are_switched() -> None:
    model = attach(build("llama"), **options_of("flylora"))
    model.set_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "molora_A" in n)
    with model.disable_adapter():
        pass
    assert not any(p.requires_grad for n, p in model.named_parameters() if "molora_A" in n)


def test_what_flylora_cannot_have_is_refused() -> None:
    with pytest.raises(GuilomoError, match=r"ranks of module .* = \(2, 2, 2\).*rank 1 for every expert.*Set r=1"):
        attach(build("llama"), **options_of("flylora", r=2))
    with pytest.raises(GuilomoError, match=r"lora_dropout = 0\.1.*dropout_on to 'rank'"):
        attach(build("llama"), **options_of("flylora", lora_dropout=0.1))
    attach(build("llama"), **options_of("flylora", lora_dropout=0.1, dropout_on="rank"))
    with pytest.raises(GuilomoError, match=r"leaves nothing to train"):
        train_only(attach(build("llama"), **options_of("flylora")), "router")


@BOTH
def test_dropped_ranks_do_not_change_the_choice(router: str) -> None:
    model = attach(build("llama"), **options_of(router, lora_dropout=0.5, dropout_on="rank")).train()
    found = []
    for _ in range(2):
        layer = _layers(model)[0]
        layer.context.in_forward = True
        layer(torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)))
        found.append(layer.molora_router["default"].take_counts())
    assert torch.equal(*found)
