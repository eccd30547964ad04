"""What is written is what is read: odd plans, other parts of PEFT, and weights that do not belong."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapter_tools import attach, logits, reload, train_a_step
from guilomo import Allocation, GuilomoError, LoraMoeConfig, ModulePlan
from guilomo.tuner import LoraMoeLayer, adaptable_modules
from tiny_models import build, inputs_for

WEIGHTS = "adapter_model.safetensors"


def _saved(folder: Path, **options: object) -> Tensor:
    """Saves a tiny Llama's adapter and returns its outputs."""
    model = attach(build("llama"), **options)
    model.save_pretrained(folder)
    return logits(model, inputs_for("llama"))


def test_modules_without_experts_are_left_alone(tmp_path: Path) -> None:
    pattern = {"q_proj": [], r"layers\.1\.mlp\.\w+": [], "v_proj": [1, 3], "o_proj": [4]}
    model = attach(build("llama"), rank_pattern=pattern)
    wrapped = {n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraMoeLayer)}
    assert not any(n.endswith("q_proj") or "layers.1.mlp" in n for n in wrapped)
    assert any("layers.0.mlp" in n for n in wrapped)
    plan = model.peft_config["default"].plan
    assert plan["model.layers.0.self_attn.v_proj"].ranks == (1, 3)
    assert plan["model.layers.0.self_attn.o_proj"].ranks == (4,)
    assert plan["model.layers.0.self_attn.q_proj"].ranks == ()
    model.save_pretrained(tmp_path)
    again = reload(build("llama"), tmp_path)
    assert again.peft_config["default"].plan == plan
    assert wrapped == {n for n, m in again.get_base_model().named_modules() if isinstance(m, LoraMoeLayer)}
    assert torch.equal(logits(again, inputs_for("llama")), logits(model, inputs_for("llama")))


def test_a_written_plan_is_followed(tmp_path: Path) -> None:
    shapes = adaptable_modules(build("llama"))
    modules = {n: ModulePlan(*s, ranks=(1, 2, 4)[: 1 + i % 3], top_k=1) for i, (n, s) in enumerate(shapes.items())}
    modules["lm_head"] = ModulePlan(*shapes["lm_head"])
    plan = Allocation(modules, scaling="alpha_over_sqrt_r", alpha=3.0, strategy="by hand")
    model = attach(build("llama"), allocation=plan)
    assert model.peft_config["default"].plan == plan
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters()
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).plan == plan
    assert torch.equal(
        logits(reload(build("llama"), tmp_path), inputs_for("llama")), logits(model, inputs_for("llama"))
    )


def test_classification_head(tmp_path: Path) -> None:
    inputs = inputs_for("bert")
    model = attach(build("bert"), target_modules=None, modules_to_save=["classifier"], task_type="SEQ_CLS")
    before = model.base_model.model.classifier.modules_to_save["default"].weight.detach().clone()
    train_a_step(model, inputs)
    assert not torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, before)
    after = logits(model, inputs)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        assert torch.equal(logits(reload(build("bert"), tmp_path, low_cpu_mem_usage=low_memory), inputs), after)


def test_two_adapters_with_their_own_heads() -> None:
    """'all-linear' the second time must not take the first adapter's head for a linear of the model."""
    inputs = inputs_for("bert")
    model = attach(build("bert"), modules_to_save=["classifier"], task_type="SEQ_CLS")
    first = set(model.peft_config["default"].plan.modules)
    config = LoraMoeConfig(num_experts=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    model.add_adapter("second", config)
    assert set(model.peft_config["second"].plan.modules) == first
    outputs = logits(model, inputs)
    model.set_adapter("second")
    assert not torch.equal(logits(model, inputs), outputs)


def test_excluded_modules_and_layers(tmp_path: Path) -> None:
    model = attach(build("llama"), exclude_modules=["down_proj", "lm_head"], target_modules="all-linear")
    names = set(model.peft_config["default"].plan.modules)
    assert names
    assert not any(n.endswith(("down_proj", "lm_head")) for n in names)
    model.save_pretrained(tmp_path / "excluded")
    again = reload(build("llama"), tmp_path / "excluded")
    assert set(again.peft_config["default"].plan.modules) == names
    assert torch.equal(logits(again, inputs_for("llama")), logits(model, inputs_for("llama")))

    model = attach(build("llama"), target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    plan = model.peft_config["default"].plan
    assert set(plan.modules) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    model.save_pretrained(tmp_path / "layers")
    again = reload(build("llama"), tmp_path / "layers")
    assert again.peft_config["default"].plan == plan
    assert torch.equal(logits(again, inputs_for("llama")), logits(model, inputs_for("llama")))


def test_a_regex_selects_modules() -> None:
    model = attach(build("llama"), target_modules=r".*layers\.0\.self_attn\.[qv]_proj")
    wanted = {f"model.layers.0.self_attn.{p}_proj" for p in "qv"}
    assert set(model.peft_config["default"].plan.modules) == wanted


def _drop(tensors: dict[str, Tensor]) -> str:
    key = next(k for k in tensors if "molora_B" in k)
    del tensors[key]
    return "missing"


def _add(tensors: dict[str, Tensor]) -> str:
    tensors["base_model.model.model.layers.7.self_attn.q_proj.molora_A"] = torch.zeros(6, 32)
    return "extra"


def _reshape(tensors: dict[str, Tensor]) -> str:
    key = next(k for k in tensors if "molora_A" in k)
    tensors[key] = tensors[key][:-1].clone()
    return r"has shape \(5, \d+\), the plan needs \(6, \d+\)"


def _other_plan(tensors: dict[str, Tensor]) -> str:
    """Ranks (1, 3, 2) have the tensor shapes of (2, 2, 2): only the saved ranks tell them apart."""
    key = next(k for k in tensors if k.endswith("ranks"))
    tensors[key] = torch.tensor([1, 3, 2])
    return r"ranks is \[1, 3, 2\], the plan says \[2, 2, 2\]"


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("damage", [_drop, _add, _reshape, _other_plan])
def test_weights_that_do_not_belong_are_refused(damage: object, low_memory: bool, tmp_path: Path) -> None:
    _saved(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    message = damage(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / f"{WEIGHTS}.sha256").unlink()
    with pytest.raises(GuilomoError, match=rf"do not belong to the allocation.*'default'.*{message}"):
        reload(build("llama"), tmp_path, low_cpu_mem_usage=low_memory)


def test_another_allocation_with_the_same_shapes_is_refused(tmp_path: Path) -> None:
    """The plan (1, 3) in the config, weights saved under (2, 2)."""
    _saved(tmp_path, target_modules=["q_proj"], rank_pattern={"q_proj": [2, 2]})
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["allocation"]["modules"]["model.layers.1.self_attn.q_proj"]["ranks"] = [1, 3]
    path.write_text(json.dumps(config))
    message = r"model\.layers\.1\.self_attn\.q_proj\.\S*ranks is \[2, 2\], the plan says \[1, 3\]"
    with pytest.raises(GuilomoError, match=message):
        reload(build("llama"), tmp_path)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path)
    with pytest.raises(GuilomoError, match=r"module|in, out"):
        reload(build("gpt2"), tmp_path)


def test_several_adapters(tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    alone = {}
    plans = {"first": {"num_experts": 2, "r": 3}, "second": {"num_experts": 4, "r": 1, "target_modules": ["q_proj"]}}
    for name, options in plans.items():
        alone[name] = _saved(tmp_path / name, **options)
    model = reload(build("llama"), tmp_path / "first", adapter_name="first")
    model.load_adapter(str(tmp_path / "second"), adapter_name="second")
    assert torch.equal(logits(model, inputs), alone["first"]), "loading a second adapter does not activate it"
    for name in ("second", "first", "second"):
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), alone[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(f".{name}" in n for n in trained)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(build("llama"), inputs))
    model.save_pretrained(tmp_path / "both")
    again = reload(build("llama"), tmp_path / "both" / "second", adapter_name="second")
    assert torch.equal(logits(again, inputs), alone["second"])
    model.set_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(logits(model, inputs), alone["first"])
    assert not any(".second" in n and "molora" in n for n in model.state_dict())
    model.load_adapter(str(tmp_path / "both" / "second"), adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(logits(model, inputs), alone["second"])


@pytest.mark.parametrize("balance_over", ["module", "layer"])
def test_two_adapters_active_at_once(balance_over: str) -> None:
    """Their changes add up, and each one's router loss sees only its own routing."""
    inputs = inputs_for("llama")
    options = {"balance_over": balance_over, "balance_coefficient": 1.0}
    model = attach(build("llama").double(), adapter="first", num_experts=3, **options)
    config = LoraMoeConfig(num_experts=2, target_modules="all-linear", init_lora_weights=True, **options)
    model.add_adapter("second", config)
    alone = logits(model, inputs)
    model.train()
    model(**inputs).loss.backward()
    single = {n: p.grad.clone() for n, p in model.named_parameters() if "router.first" in n}
    model.zero_grad()
    model.base_model.set_adapter(["first", "second"])
    context = next(m for m in model.modules() if isinstance(m, LoraMoeLayer)).context
    context.record = True
    assert torch.allclose(logits(model, inputs), alone, rtol=1e-12)
    model.train()
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if "router.first" in name:
            assert torch.allclose(parameter.grad, single[name], rtol=1e-9, atol=1e-12)
        elif "router.second" in name:
            assert parameter.grad.abs().max() > 0
    assert {s.counts.numel() for s in context.statistics.values()} == {3}, "the record is the first adapter's"


def test_deepcopy_and_pickle() -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"))
    train_a_step(model, inputs)
    outputs = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), outputs)
        contexts = {id(m.context) for m in twin.modules() if isinstance(m, LoraMoeLayer)}
        originals = {id(m.context) for m in model.modules() if isinstance(m, LoraMoeLayer)}
        assert len(contexts) == 1
        assert contexts.isdisjoint(originals)
        train_a_step(twin, inputs)
        context = next(m for m in twin.modules() if isinstance(m, LoraMoeLayer)).context
        assert context.real is not None, "the copy's hooks feed the copy's context"
        assert not torch.equal(logits(twin, inputs), outputs)
        assert torch.equal(logits(model, inputs), outputs)


def test_model_card_tells_how_to_load(tmp_path: Path) -> None:
    model = attach(build("llama"), task_type="CAUSAL_LM")
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import guilomo, peft") == 1
    assert "pip install guilomo" in card


def test_auto_peft_model(tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    model = attach(base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(again, PeftModel)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_transformers_own_adapter_interface(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    inputs = inputs_for("llama")
    base = logits(build("llama"), inputs)
    model = build("llama")
    config = LoraMoeConfig(num_experts=3, r=2, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter(config, adapter_name="mine")
    train_a_step(model, inputs)
    context = next(m for m in model.modules() if isinstance(m, LoraMoeLayer)).context
    assert context.real is not None, "the hooks run without PEFT's wrapper"
    after = logits(model, inputs)
    assert not torch.equal(after, base)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), base)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), after)

    model.save_pretrained(tmp_path / "adapter")
    again = build("llama")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, inputs), after)
    peft = reload(build("llama"), tmp_path / "adapter")
    assert torch.equal(logits(peft, inputs), after), "PEFT reads what transformers wrote"

    build("llama").save_pretrained(tmp_path / "base")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    saved["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(saved))
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(auto, inputs), after)

    model.delete_adapter("mine")
    assert torch.equal(logits(model, inputs), base)


def test_unload_leaves_the_base_model_without_traces() -> None:
    inputs, plain = inputs_for("llama"), build("llama")
    base = build("llama")
    hooks = len(base._forward_hooks), len(base._forward_pre_hooks)
    bare = attach(base).unload()
    assert bare is base
    assert (len(bare._forward_hooks), len(bare._forward_pre_hooks)) == hooks
    assert set(bare.state_dict()) == set(plain.state_dict())
    assert torch.equal(logits(bare, inputs), logits(plain, inputs))
    again = attach(bare)  # and it can be adapted anew
    train_a_step(again, inputs)
    assert next(m for m in again.modules() if isinstance(m, LoraMoeLayer)).context.real is not None


FRESH = """
    import os, sys
    os.environ["HF_HUB_OFFLINE"] = "1"
    {imports}
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded", type(model.base_model).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("imports", "loads"), [("import guilomo", True), ("", False)])
def test_a_fresh_process(imports: str, loads: bool, tmp_path: Path) -> None:
    """It loads after `import guilomo`; without, it fails loudly instead of loading something else."""
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    attach(base, task_type="CAUSAL_LM").save_pretrained(tmp_path / "adapter")
    script = textwrap.dedent(FRESH.format(imports=imports))
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "adapter")], capture_output=True, text=True, check=False
    )
    if loads:
        assert ran.stdout.strip() == "loaded LoraMoeModel", ran.stderr
    else:
        assert ran.returncode != 0
        assert "KeyError: 'MOLORA'" in ran.stderr
