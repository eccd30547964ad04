"""Routers alone or experts too: what `requires_grad` says, also after everything that sets it anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from adapter_tools import attach, logits, train_a_step
from bank_tools import save_bank
from guilomo import GuilomoError
from guilomo.adapters import mixture_of, train_only
from tiny_models import build, inputs_for


@pytest.fixture
def mixture(tmp_path: Path) -> PeftModel:
    return mixture_of(build("llama"), save_bank(tmp_path, {"a": {}, "b": {"r": 3}}))


def _trained(model: torch.nn.Module) -> set[str]:
    """Kinds of the parameters that are trained."""
    kinds = ("molora_A", "molora_B", "molora_router")
    return {next((k for k in kinds if k in n), n) for n, p in model.named_parameters() if p.requires_grad}


def test_switching(mixture: PeftModel) -> None:
    assert _trained(mixture) == {"molora_router"}
    train_only(mixture, "all")
    assert _trained(mixture) == {"molora_A", "molora_B", "molora_router"}
    assert mixture.peft_config["default"].train == "all"
    train_only(mixture, "router")
    assert _trained(mixture) == {"molora_router"}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("train", ["router", "all"])
def test_saved_and_loaded_again(mixture: PeftModel, tmp_path: Path, train: str, low_memory: bool) -> None:
    train_only(mixture, train)
    train_a_step(mixture, inputs_for("llama"))
    wanted = _trained(mixture)
    mixture.save_pretrained(tmp_path / "m")
    options = {"low_cpu_mem_usage": low_memory}
    again = PeftModel.from_pretrained(build("llama"), str(tmp_path / "m"), is_trainable=True, **options)
    assert _trained(again) == wanted
    assert torch.equal(logits(again, inputs_for("llama")), logits(mixture, inputs_for("llama")))
    assert not _trained(PeftModel.from_pretrained(build("llama"), str(tmp_path / "m"), **options))


def test_other_adapters_and_switching_between_them(mixture: PeftModel) -> None:
    plain = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(GuilomoError, match=r"adapter = 'default'.*a mixture"):
        train_only(plain, "router")
    other = attach(build("llama"), num_experts=2).peft_config["default"]
    mixture.add_adapter("other", other)
    mixture.set_adapter("other")
    trained = {n for n, p in mixture.named_parameters() if p.requires_grad}
    assert trained
    assert all(".other" in name for name in trained)
    train_only(mixture, "router", "default")
    assert {n for n, p in mixture.named_parameters() if p.requires_grad} == trained
    mixture.set_adapter("default")
    assert _trained(mixture) == {"molora_router"}
    with mixture.disable_adapter():
        pass
    assert _trained(mixture) == {"molora_router"}
    mixture.delete_adapter("other")
    assert _trained(mixture) == {"molora_router"}


@pytest.mark.parametrize(
    ("train", "adapter", "says"),
    [("experts", "default", "train = 'experts'"), ("all", "none", r"adapter = 'none'.*one of default")],
)
def test_mistakes(mixture: PeftModel, train: str, adapter: str, says: str) -> None:
    with pytest.raises(GuilomoError, match=says):
        train_only(mixture, train, adapter)


def test_without_routers_there_is_nothing_to_train(tmp_path: Path) -> None:
    folders = save_bank(tmp_path, {"a": {}})
    with pytest.raises(GuilomoError, match=r"nothing to train.*train='all'"):
        mixture_of(build("llama"), folders)
    model = mixture_of(build("llama"), folders, train="all")
    with pytest.raises(GuilomoError, match="nothing to train"):
        train_only(model, "router")
