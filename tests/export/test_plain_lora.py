"""The exported folder is an ordinary LoRA adapter: it loads where guilomo is not, and computes the frozen mixture."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from guilomo import GuilomoError, LoraMoeConfig
from guilomo.export import mean_gates, merged_copy, plain_lora, unadapted_copy
from guilomo.layers.routing import Routing
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for

PATTERNS = {
    "llama": {".*q_proj": [1, 3], ".*v_proj": [4]},
    "bert": {".*query": [1, 3], ".*value": [4]},
    "gpt2": {".*c_attn": [1, 3], ".*c_fc": [4]},
}
"""Modules of rank 4 and 6, some with a single expert."""


def _mixture(name: str, **options: object) -> PeftModel:
    given = {"num_experts": 3, "r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    kind = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    return get_peft_model(build(name), LoraMoeConfig(task_type=kind, **given)).eval()


def _outputs(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_for(name)).logits


def _frozen_outputs(model: PeftModel, gates: dict[str, Tensor], name: str) -> Tensor:
    """The mixture with every router replaced by constant gates."""
    layers = [m for m in model.modules() if isinstance(m, LoraMoeLayer) and "default" in m.molora_router]
    for layer in layers:
        weights = gates[layer.name].float()
        router = layer.molora_router["default"]
        router.route = lambda u, tokens, w=weights: Routing(w.expand_as(u), u)
    found = _outputs(model, name)
    for layer in layers:
        del layer.molora_router["default"].route
    return found


@pytest.mark.parametrize("uniform", [False, True], ids=["own ranks", "one rank"])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_computes_the_mixture_with_frozen_gates(name: str, uniform: bool, tmp_path: Path) -> None:
    model = _mixture(name, rank_pattern=PATTERNS[name])
    gates = mean_gates(model, [inputs_for(name)])
    plain_lora(model, gates, uniform_rank=uniform).save(tmp_path)
    loaded = PeftModel.from_pretrained(unadapted_copy(model), str(tmp_path))
    wanted = _frozen_outputs(model, gates, name)
    assert torch.allclose(_outputs(loaded, name), wanted, rtol=0, atol=2e-6)
    assert (wanted - _outputs(model, name)).abs().max() > 1e-4
    assert (wanted - _outputs(build(name), name)).abs().max() > 1e-3
    shapes = {v.shape[0] for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if ".lora_A." in k}
    assert shapes == ({6} if uniform else {4, 6})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    # Servers that do not know patterns scale by this alone.
    assert config["lora_alpha"] == config["r"] == 6
    assert bool(config["rank_pattern"]) is bool(config["alpha_pattern"]) is not uniform


ALONE = """
    import json, sys, torch
    from peft import PeftModel
    from transformers import BertForSequenceClassification
    base, adapter, inputs, out = sys.argv[1:]
    model = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(inputs)).logits, out)
    assert "guilomo" not in sys.modules
"""


@pytest.mark.slow
def test_loads_in_a_process_without_guilomo(tmp_path: Path) -> None:
    """The trained head comes along: the base model on disk has another one."""
    build("bert").save_pretrained(tmp_path / "base")
    model = _mixture("bert", rank_pattern=PATTERNS["bert"])
    head = model.base_model.model.classifier.modules_to_save["default"]
    head.weight.data.normal_()
    gates = mean_gates(model, [inputs_for("bert")])
    plain_lora(model, gates).save(tmp_path / "lora")
    torch.save(inputs_for("bert"), tmp_path / "inputs")
    places = [str(tmp_path / part) for part in ("base", "lora", "inputs", "out")]
    code = textwrap.dedent(ALONE)
    subprocess.run([sys.executable, "-W", "error::UserWarning:peft", "-c", code, *places], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "out")
    assert torch.allclose(found, _frozen_outputs(model, gates, "bert"), rtol=0, atol=2e-6)
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], head.weight)


def test_svd_at_full_rank_equals_stacked() -> None:
    model = _mixture("llama", rank_pattern=PATTERNS["llama"]).double()
    gates = mean_gates(model, [inputs_for("llama")])
    whole, cut = plain_lora(model, gates), plain_lora(model, gates, rank=6)
    for name, pair in whole.factors.items():
        other = cut.factors[name]
        assert torch.allclose(other.b @ other.a, pair.b @ pair.a, rtol=0, atol=1e-10)
        assert cut.energy[name] == pytest.approx(1, abs=1e-12)


def test_svd_to_a_lower_rank_cuts_every_module() -> None:
    model = _mixture("llama", rank_pattern=PATTERNS["llama"])
    cut = plain_lora(model, mean_gates(model, [inputs_for("llama")]), rank=2)
    assert {pair.rank for pair in cut.factors.values()} == {2}
    assert all(0 < energy < 1 for energy in cut.energy.values())
    assert (cut.config.r, cut.config.rank_pattern) == (2, {})


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_cannot_be(rank: int) -> None:
    model = _mixture("llama")
    gates = mean_gates(model, [inputs_for("llama")])
    with pytest.raises(GuilomoError, match=rf"rank = {rank} .* from 1 to 6, the highest rank"):
        plain_lora(model, gates, rank=rank)


def test_constant_gates_merge_exactly() -> None:
    model = _mixture("bert", router="fixed", router_options={"weights": [0.5, 0.2, 0.3]})
    wanted = _outputs(model, "bert")
    merged = merged_copy(model)
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(_outputs(merged, "bert"), wanted, rtol=0, atol=1e-6)
    assert torch.equal(_outputs(model, "bert"), wanted)


def test_routed_mixtures_do_not_merge() -> None:
    with pytest.raises(GuilomoError, match=r"depend on the token.*--to stacked"):
        merged_copy(_mixture("llama"))


def test_an_unadapted_copy_shares_the_weights_and_is_the_base() -> None:
    model = _mixture("llama")
    before, base = _outputs(model, "llama"), unadapted_copy(model)
    assert torch.equal(_outputs(base, "llama"), _outputs(build("llama"), "llama"))
    assert torch.equal(_outputs(model, "llama"), before)
    frozen = model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert base.model.layers[0].self_attn.q_proj.weight is frozen
