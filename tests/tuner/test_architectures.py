"""Every architecture: attach, train, save, reload exactly, disable exactly, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adapter_tools import attach, logits, reload, train_a_step
from guilomo import Allocation
from guilomo.tuner import LoraMoeLayer
from tiny_models import ARCHITECTURES, DECODERS, build, inputs_for

TARGETS = [(name, "all-linear") for name in ARCHITECTURES] + [
    (name, None) for name in ARCHITECTURES if name not in ("gpt2", "vit")
]


@pytest.mark.parametrize(("name", "targets"), [*TARGETS, ("gpt2", ["c_attn"]), ("vit", ["q_proj"])])
def test_life_of_an_adapter(name: str, targets: str | list[str] | None, tmp_path: Path) -> None:
    inputs = inputs_for(name)
    base = logits(build(name), inputs)
    model = attach(build(name), target_modules=targets)
    adapted = {n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraMoeLayer)}
    plan = model.peft_config["default"].plan
    assert plan is not None
    assert adapted == set(plan.adapted())
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == plan.parameters()

    train_a_step(model, inputs)
    parameters = dict(model.named_parameters())
    for kind in ("molora_A", "molora_B", "molora_router"):
        assert any(kind in n and not torch.equal(p, parameters[n]) for n, p in trained.items()), f"{kind} did not move"
    assert all(torch.equal(p, parameters[n]) for n, p in frozen.items()), "a frozen weight moved"

    after = logits(model, inputs)
    assert not torch.equal(after, base)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), after)

    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOLORA"
    assert Allocation.from_dict(written["allocation"]) == plan
    for low_memory in (False, True):
        again = reload(build(name), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(logits(again, inputs), after)
        assert again.peft_config["default"].plan == plan
        assert all(t.device.type != "meta" for t in (*again.parameters(), *again.buffers()))


@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str) -> None:
    """With and without a key-value cache the same tokens come out, and they are not the base model's."""
    model = attach(build(name), init_lora_weights=True)
    prompt = {k: v for k, v in inputs_for(name).items() if k != "labels"}
    options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    model.eval()
    plain = build(name).eval().generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), plain), "B = 0 is the base model"
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "molora_B" in parameter_name:
                parameter.normal_(std=1.0)
    cached = model.generate(**prompt, **options, use_cache=True)
    assert cached.shape == (3, 11)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
    assert not torch.equal(cached, plain)


def test_starts_at_the_base_model() -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"), init_lora_weights=True)
    assert torch.equal(logits(model, inputs), logits(build("llama"), inputs))


@pytest.mark.parametrize(("router", "trained"), [("topk", True), ("dense", True), ("fixed", False)])
def test_routers_on_a_model(router: str, trained: bool, tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"), router=router)
    train_a_step(model, inputs)
    assert any("molora_router" in n for n, _ in model.named_parameters()) == trained
    after = logits(model, inputs)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        assert torch.equal(logits(reload(build("llama"), tmp_path, low_cpu_mem_usage=low_memory), inputs), after)


def test_bfloat16_base_with_float32_experts(tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama").bfloat16(), num_experts=3, r=3)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    train_a_step(model, inputs)
    after = logits(model, inputs)
    assert after.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(reload(build("llama").bfloat16(), tmp_path), inputs), after)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_casting_the_whole_model_keeps_the_scales(cast: str) -> None:
    model = getattr(attach(build("llama"), r=3, lora_alpha=16), cast)()
    layer = next(m for m in model.modules() if isinstance(m, LoraMoeLayer))
    spread = layer.molora_layout["default"].spread
    assert set(spread.unique().tolist()) == {0.0, torch.tensor(16 / 3, dtype=spread.dtype).item()}
    assert logits(model, inputs_for("llama")).isfinite().all()
