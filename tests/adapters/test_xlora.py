"""PEFT's X-LoRA of a bank: what it computes, what is trained, and that it is found again where it was saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, XLoraConfig
from peft.tuners.xlora.layer import XLoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter_tools import logits, train_a_step
from bank_tools import alone, save_adapter, save_bank, save_bank_of
from guilomo import GuilomoError
from guilomo.adapters import adapters_in, load_xlora, mixture_of, save_xlora, softmax_is_per_token, xlora_of
from guilomo.evaluation import evaluate
from guilomo.tasks import TaskConfig, build_task
from guilomo.training import TrainConfig, fine_tune
from tiny_models import build, inputs_for

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "lora_alpha": 7},
    "b": {"r": 2, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj"]},
    "c": {"r": 4, "target_modules": ["o_proj", "down_proj"]},
}


@pytest.fixture
def bank(tmp_path: Path) -> dict[str, Path]:
    return save_bank(tmp_path / "bank", ADAPTERS)


def _score(model: PeftModel, scores: list[float]) -> None:
    """Makes the classifier give these scores to every token and module."""
    last = model.base_model.internal_xlora_classifier.layers[-1]
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor(scores, dtype=last.bias.dtype).repeat(len(last.bias) // len(scores))


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("expert", [0, 1, 2])
def test_all_weight_on_one_adapter_is_that_adapter_alone(bank: dict[str, Path], expert: int, layerwise: bool) -> None:
    model = xlora_of(build("llama").double(), bank, layerwise=layerwise)
    _score(model, [0.0 if e == expert else -1e4 for e in range(3)])
    wanted = logits(alone(list(bank.values())[expert]), inputs_for("llama"))
    torch.testing.assert_close(logits(model, inputs_for("llama")), wanted, rtol=1e-12, atol=1e-13)


def test_equal_scores_are_the_mixture_with_fixed_gates(bank: dict[str, Path]) -> None:
    """Two ways to the average of the adapters: PEFT's code and ours."""
    model = xlora_of(build("llama").double(), bank)
    _score(model, [0.0, 0.0, 0.0])
    mixture = mixture_of(build("llama").double(), bank, router="fixed", train="all")
    inputs = inputs_for("llama")
    torch.testing.assert_close(logits(model, inputs), logits(mixture, inputs), rtol=1e-12, atol=1e-13)


def test_top_k_is_the_mixture_of_the_kept(bank: dict[str, Path]) -> None:
    model = xlora_of(build("llama").double(), bank, top_k=2)
    _score(model, [0.5, -0.5, 1.5])
    kept = {name: bank[name] for name in ("a", "c")}
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64).softmax(0).tolist()
    mixture = mixture_of(
        build("llama").double(), kept, router="fixed", router_options={"weights": weights}, train="all"
    )
    inputs = inputs_for("llama")
    torch.testing.assert_close(logits(model, inputs), logits(mixture, inputs), rtol=1e-12, atol=1e-13)


def test_every_token_has_k_weights_of_sum_1(bank: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that differ between tokens; a softmax over all of them would give each a small part of 1."""
    model = xlora_of(build("llama").double(), bank, top_k=2)
    nn.init.normal_(model.base_model.internal_xlora_classifier.layers[-1].weight)
    seen: list[Tensor] = []
    given = XLoraLayer.get_maybe_topk_scalings

    def watched(layer: Any, scalings: Tensor) -> Tensor:
        seen.append(given(layer, scalings))
        return seen[-1]

    monkeypatch.setattr(XLoraLayer, "get_maybe_topk_scalings", watched)
    logits(model, inputs_for("llama"))
    weights = seen[-1]
    assert weights.shape == (3, 7, 3)
    assert len(weights.flatten(0, 1).unique(dim=0)) == 21
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7, dtype=weights.dtype), rtol=1e-6, atol=0)
    assert ((weights > 0).sum(-1) == 2).all()


def test_disabled_it_is_the_base_model(bank: dict[str, Path]) -> None:
    model = xlora_of(build("llama").double(), bank)
    inputs = inputs_for("llama")
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(build("llama").double(), inputs))


def test_tokens_do_not_see_each_other_across_rows(bank: dict[str, Path]) -> None:
    model = xlora_of(build("llama").double(), bank, top_k=2)
    inputs = {name: value for name, value in inputs_for("llama").items() if name != "labels"}
    whole = logits(model, inputs)
    single = logits(model, {name: value[1:2] for name, value in inputs.items()})
    torch.testing.assert_close(whole[1:2], single, rtol=1e-10, atol=1e-12)


def _over_all_tokens(layer: Any, scalings: Tensor) -> Tensor:
    """As earlier versions of PEFT did it."""
    found = scalings[:, :, layer.layer_number, :]
    mask = torch.zeros_like(found, dtype=torch.bool).scatter_(-1, found.topk(layer.config.top_k_lora, -1).indices, True)
    weights = torch.zeros_like(found)
    weights[mask] = found[mask].softmax(-1)
    return weights


def test_a_softmax_over_all_tokens_is_noticed(bank: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert softmax_is_per_token()
    monkeypatch.setattr(XLoraLayer, "get_maybe_topk_scalings", _over_all_tokens)
    assert not softmax_is_per_token()
    with pytest.raises(GuilomoError, match=r"softmax per token.*leave top_k unset"):
        xlora_of(build("llama"), bank, top_k=2)
    xlora_of(build("llama"), bank)


def test_the_classifier_alone_is_trained(bank: dict[str, Path]) -> None:
    model = xlora_of(build("llama"), bank, depth=2, size=16)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "internal_xlora_classifier" in n}
    assert len(trained) == 4
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_a_step(model, inputs_for("llama"))
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == trained
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_it_is_trained_as_mixtures_are(llama_folder: Path, colours: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    bank = adapters_in(save_bank_of(base, tmp_path / "other", ADAPTERS))
    task = build_task(
        TaskConfig(kind="causal_lm", source=str(colours), name="colours", max_length=64),
        AutoTokenizer.from_pretrained(llama_folder),
    )
    model = xlora_of(base, bank)
    before = evaluate(model, task).metrics["loss"].value
    fine_tune(model, task, TrainConfig(max_steps=10, batch_size=8, learning_rate=0.05), tmp_path / "fit")
    assert evaluate(model, task).metrics["loss"].value < before


def test_why_peft_does_not_save_it(bank: dict[str, Path], tmp_path: Path) -> None:
    """When this fails, PEFT has mended its saving, and `save_xlora` may go."""
    xlora_of(build("llama").double(), bank).save_pretrained(tmp_path / "x")
    assert not load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "x" / "0" / "adapter_model.safetensors"))


def test_saved_and_loaded_where_the_bank_is_gone(bank: dict[str, Path], tmp_path: Path) -> None:
    model = xlora_of(build("llama").double(), bank)
    train_a_step(model, inputs_for("llama"))
    save_xlora(model, tmp_path / "x")
    shutil.rmtree(tmp_path / "bank")
    for trainable in (False, True):
        torch.manual_seed(5)
        again = load_xlora(build("llama").double(), tmp_path / "x", trainable)
        assert torch.equal(logits(again, inputs_for("llama")), logits(model, inputs_for("llama")))
        trained = {n for n, p in again.named_parameters() if p.requires_grad}
        assert trained == ({n for n, p in model.named_parameters() if p.requires_grad} if trainable else set())
    save_xlora(again, tmp_path / "x")
    save_xlora(again, tmp_path / "y")
    for name in ("x", "y"):
        third = load_xlora(build("llama").double(), tmp_path / name)
        assert torch.equal(logits(third, inputs_for("llama")), logits(model, inputs_for("llama")))
    assert sum(f.stat().st_size for f in (tmp_path / "y").rglob("*.safetensors")) < 50_000
    config: XLoraConfig = model.peft_config["default"]
    assert list(config.adapters) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_k": 4}, r"top_k = 4.*from 1 to 3"),
        ({"top_k": 2, "temperature": 0.5}, r"temperature = 0\.5.*1 with top_k"),
        ({"names": ["x"]}, r"names = \['x'\]"),
    ],
)
def test_options(bank: dict[str, Path], options: dict[str, Any], says: str) -> None:
    with pytest.raises(GuilomoError, match=says):
        xlora_of(build("llama"), bank, **options)


def test_what_peft_cannot_load_is_refused(bank: dict[str, Path], tmp_path: Path) -> None:
    gpt2 = save_adapter(tmp_path / "gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(GuilomoError, match=r"module = 'transformer\..*Use mixture_of"):
        xlora_of(build("gpt2"), [gpt2])
    head = save_adapter(tmp_path / "head", modules_to_save=["lm_head"])
    with pytest.raises(GuilomoError, match=r"also saved = 'lm_head\.weight'"):
        xlora_of(build("llama").double(), [head])
    with pytest.raises(GuilomoError, match=r"model = 'PeftModel.*the base model"):
        xlora_of(alone(bank["a"]), bank)
    with pytest.raises(GuilomoError, match=r"model = .*LORA.*an X-LoRA"):
        save_xlora(alone(bank["a"]), tmp_path / "z")
    for folder in (tmp_path / "nowhere", bank["a"]):
        with pytest.raises(GuilomoError, match="a saved X-LoRA"):
            load_xlora(build("llama"), folder)
