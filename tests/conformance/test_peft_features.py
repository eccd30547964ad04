"""What PEFT offers around an adapter works on a mixture as on any other method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    save_as_lora,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from adapter_tools import attach, logits, reload, train_a_step
from guilomo import GuilomoError, LoraMoeConfig
from guilomo.export import mean_gates
from guilomo.tuner import LoraMoeLayer, fixed_gates
from tiny_models import build, inputs_for


def _mixture(**options: object) -> LoraMoeConfig:
    return LoraMoeConfig(num_experts=3, r=2, target_modules="all-linear", init_lora_weights=False, **options)


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_status_and_parameter_counts(task: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    model = attach(build("llama"), task_type=task)
    trained = model.peft_config["default"].plan.parameters()
    assert model.get_nb_trainable_parameters()[0] == trained
    model.print_trainable_parameters()
    assert f"trainable params: {trained:,} ||" in capsys.readouterr().out
    status = model.get_model_status()
    assert (status.trainable_params, status.num_adapter_layers) == (trained, 14)
    assert (status.peft_types, status.requires_grad) == ({"default": "MOLORA"}, {"default": True})
    assert {layer.module_type for layer in model.get_layer_status()} == {"molora.LoraMoeLayer"}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@pytest.mark.parametrize("low_memory", [False, True])
def test_inject_adapter_in_model(low_memory: bool) -> None:
    inputs = inputs_for("llama")
    model = inject_adapter_in_model(_mixture(), build("llama"))
    train_a_step(model, inputs)
    saved, wanted = get_peft_model_state_dict(model), logits(model, inputs)
    torch.manual_seed(9)
    other = inject_adapter_in_model(_mixture(), build("llama"), low_cpu_mem_usage=low_memory)
    found = set_peft_model_state_dict(other, saved, low_cpu_mem_usage=low_memory)
    assert not found.unexpected_keys
    assert not any("molora" in key for key in found.missing_keys)
    assert torch.equal(logits(other, inputs), wanted)
    assert not torch.equal(wanted, logits(build("llama"), inputs))


def test_loraplus_optimizer() -> None:
    """The up-projections get the larger rate, everything else trained the ordinary one, and nothing is left out."""
    model = attach(build("llama"))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {n: 0.016 if "molora_B" in n else 1e-3 for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    model(**inputs_for("llama")).loss.backward()
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(rates)


def _frozen_at(model: torch.nn.Module, gates: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Outputs with the same gates for every token, by hand: ``x W^T + s g_e (x A_e^T) B_e^T`` summed over experts."""
    handles = []
    for layer in (m for m in model.modules() if isinstance(m, LoraMoeLayer)):
        a, b, layout = layer.molora_A["default"], layer.molora_B["default"], layer.molora_layout["default"]
        rows = (gates[layer.name].to(a.dtype)[:, None] * layout.spread).sum(0)

        def output(
            layer: LoraMoeLayer, args: tuple[Tensor, ...], y: Tensor, a: Tensor = a, b: Tensor = b, rows: Tensor = rows
        ) -> Tensor:
            return layer.base_layer(args[0]) + ((args[0] @ a.T) * rows) @ b.T

        handles.append(layer.register_forward_hook(output))
    found = logits(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def test_conversion_to_plain_lora_at_mean_gates(tmp_path: Path) -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"), rank_pattern={"up_proj": [1, 3, 2]})
    gates = mean_gates(model, [inputs])
    wanted = _frozen_at(model, gates, inputs)
    assert (wanted - logits(model, inputs)).abs().max() > 1e-4, "the gates do depend on the token"
    with fixed_gates(model, gates):
        config, weights = convert_to_lora(model, rank=6)
        save_as_lora(tmp_path, model, rank=6)
    assert isinstance(config, LoraConfig)
    direct = get_peft_model(build("llama"), config)
    set_peft_model_state_dict(direct, weights)
    for plain in (direct, reload(build("llama"), tmp_path)):
        assert (logits(plain, inputs) - wanted).abs().max() <= 1e-6


def test_conversion_without_gates_is_refused() -> None:
    model = attach(build("llama"))
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*LoraMoeLayer"):
        convert_to_lora(model, rank=6)
    gates = mean_gates(model, [inputs_for("llama")])
    name = next(iter(gates))
    for wrong in ({n: g for n, g in gates.items() if n != name}, {**gates, name: torch.ones(4)}):
        with (
            pytest.raises(GuilomoError, match=r"gates\['model\.layers\.0\.self_attn\.q_proj'\].*3 experts"),
            fixed_gates(model, wrong),
        ):
            pass
    with fixed_gates(model, gates):
        assert model.supports_lora_conversion()
        with pytest.raises(GuilomoError, match=r"cannot be merged"):
            model.merge_and_unload()
    assert not model.supports_lora_conversion()


def test_hotswap_is_refused(tmp_path: Path) -> None:
    model = attach(build("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"only supports LORA but MOLORA"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
