"""Ready-made adapters as experts: each does what it does alone, and nothing that cannot be done is done silently."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapter_tools import gradients, logits, train_a_step
from bank_tools import MIXED, alone, mixtures, save, save_adapter, save_bank, send_everything_to
from guilomo import GuilomoError
from guilomo.adapters import mixture_of, read_adapter
from guilomo.tuner import SelectionMasks
from tiny_models import build, inputs_for

BERT: dict[str, dict[str, Any]] = {
    name: {"target_modules": targets, "task_type": "SEQ_CLS"} for name, targets in (("a", ["query"]), ("b", ["value"]))
}
GPT2: dict[str, dict[str, Any]] = {
    "a": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "b": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "r": 5},
}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_bank(tmp_path_factory.mktemp("bank"))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("expert", [0, 1, 2])
def test_all_weight_on_one_expert_is_that_adapter_alone(
    bank: dict[str, Path], expert: int, top_k: int, path: str
) -> None:
    """(The sorted path steps aside here.)"""
    model = mixture_of(build("llama").double(), bank, top_k=top_k)
    send_everything_to(model, expert)
    inputs = inputs_for("llama")
    wanted = logits(alone(list(bank.values())[expert]), inputs)
    assert (wanted - logits(build("llama").double(), inputs)).abs().max() > 0.1
    torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-12, atol=1e-13)


def test_meteora_is_every_adapter_alone_and_trains_its_gates_alone(bank: dict[str, Path]) -> None:
    """One gate row ``d_in`` per adapter and module; scales of the adapters are their own; disabled it is the base."""
    inputs = inputs_for("llama")
    for expert, folder in enumerate(bank.values()):
        model = mixture_of(build("llama").double(), bank, router="meteora", top_k=1)
        send_everything_to(model, expert)
        torch.testing.assert_close(logits(model, inputs), logits(alone(folder), inputs), rtol=1e-12, atol=1e-13)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == {n for n, _ in model.named_parameters() if ".molora_router." in n}
    assert sum(p.numel() for p in trained.values()) == sum(3 * m.in_features for m in mixtures(model).values())
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(build("llama").double(), inputs))


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_router_does_not_matter_where_adapters_are_equal(tmp_path: Path, top_k: int) -> None:
    folders = {name: save_adapter(tmp_path / name, r=3, lora_alpha=7) for name in "abc"}
    model = mixture_of(build("llama").double(), folders, top_k=top_k)
    inputs = inputs_for("llama")
    wanted = logits(alone(folders["a"]), inputs)
    for seed in range(2):
        torch.manual_seed(seed)
        for layer in mixtures(model).values():
            torch.nn.init.normal_(layer.molora_router["default"].weight)
        torch.testing.assert_close(logits(model, inputs), wanted, rtol=1e-11, atol=1e-12)


def test_all_chosen_is_the_dense_mixture(bank: dict[str, Path]) -> None:
    found = []
    for options in ({"top_k": 3}, {"router": "dense"}):
        torch.manual_seed(0)
        found.append(logits(mixture_of(build("llama").double(), bank, **options), inputs_for("llama")))
    assert torch.equal(*found)


@pytest.mark.parametrize(("base", "adapters"), [("gpt2", GPT2), ("bert", BERT)])
def test_other_architectures(tmp_path: Path, base: str, adapters: dict[str, Any]) -> None:
    folders = save_bank(tmp_path, adapters, base)
    options = {"saved_from": "b"} if base == "bert" else {}
    model = mixture_of(build(base).double(), folders, **options)
    send_everything_to(model, 1)
    inputs = inputs_for(base)
    torch.testing.assert_close(logits(model, inputs), logits(alone(folders["b"], base), inputs), rtol=1e-12, atol=1e-13)


def test_one_adapter_is_plain_lora_bit_for_bit_where_its_scale_is_1(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one", r=3, lora_alpha=3)
    model = mixture_of(build("llama").double(), [folder], train="all")
    assert not any(layer.molora_router for layer in mixtures(model).values())
    assert torch.equal(logits(model, inputs_for("llama")), logits(alone(folder), inputs_for("llama")))


def test_factors_are_copied_and_scales_are_folded_into_b(bank: dict[str, Path]) -> None:
    model = mixture_of(build("llama").double(), bank)
    layers, adapters = mixtures(model), [read_adapter(folder) for folder in bank.values()]
    scales = {
        "math": lambda module: 7 / 3,
        "code": lambda module: 5 / math.sqrt(4),
        "law": lambda module: (11 if "o_proj" in module else 2) / (5 if "layers.1.self_attn.q" in module else 2),
    }
    assert set(layers) == {module for adapter in adapters for module in adapter.pairs}
    for module, layer in layers.items():
        assert layer.molora_layout["default"].scales == (1.0, 1.0, 1.0)
        ranks = layer.molora_layout["default"].all_ranks
        parts = zip(
            adapters, layer.molora_A["default"].split(ranks), layer.molora_B["default"].split(ranks, 1), strict=True
        )
        for adapter, a, b in parts:
            if module not in adapter.pairs:
                assert len(a) == 1
                assert not a.any()
                assert not b.any()
                continue
            pair, scale = adapter.pairs[module], scales[adapter.name](module)
            assert pair.scale == scale
            assert torch.equal(a, pair.a)
            assert torch.equal(b, pair.b * scale)


def test_half_precision_rounds_the_folded_scale_once(tmp_path: Path) -> None:
    folders = save_bank(tmp_path, {"a": {"r": 3, "lora_alpha": 7}, "b": {"r": 2, "lora_alpha": 8}})
    model = mixture_of(build("llama"), folders)
    layer = mixtures(model)["model.layers.0.self_attn.q_proj"]
    thirds, fours = layer.molora_B["default"].split((3, 2), 1)
    assert thirds.dtype == torch.float32
    assert torch.equal(thirds, (read_adapter(folders["a"]).pairs[layer.name].b.double() * (7 / 3)).float())
    assert torch.equal(fours, 4 * read_adapter(folders["b"]).pairs[layer.name].b.float())


def test_an_adapter_that_cannot_be_chosen_changes_nothing(bank: dict[str, Path]) -> None:
    two = mixture_of(build("llama").double(), {n: bank[n] for n in ("math", "code")}, top_k=2)
    three = mixture_of(build("llama").double(), bank, top_k=2)
    base = three.get_base_model()
    few = mixtures(two)
    for name, layer in mixtures(three).items():
        rows = layer.molora_router["default"].weight
        log_expert = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
        if name in few:
            rows.data[:2] = few[name].molora_router["default"].weight.data
        layer.context.masks[name] = SelectionMasks(log_expert, None)
    inputs = inputs_for("llama")
    before = logits(three, inputs)
    torch.testing.assert_close(before, logits(two, inputs), rtol=1e-12, atol=1e-13)
    base.__dict__["_guilomo_context"].masks.clear()
    assert (logits(three, inputs) - before).abs().max() > 1e-6


def test_only_routers_are_trained(bank: dict[str, Path], path: str) -> None:
    model = mixture_of(build("llama").double(), bank, balance_loss="switch", balance_coefficient=0.1)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".molora_router." in n}
    assert trained
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_a_step(model, inputs_for("llama"))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained


def test_gradients_of_routers_are_those_of_training_everything(bank: dict[str, Path], path: str) -> None:
    found = {}
    for train in ("router", "all"):
        torch.manual_seed(0)
        model = mixture_of(build("llama").double(), bank, train=train)
        model(**inputs_for("llama")).loss.backward()
        found[train] = gradients(model)
    assert any(".molora_A" in name for name in found["all"])
    for name, gradient in found["router"].items():
        assert gradient.any()
        torch.testing.assert_close(gradient, found["all"][name], rtol=1e-12, atol=1e-14)


def test_absent_adapters_stay_absent_in_training(bank: dict[str, Path]) -> None:
    model = mixture_of(build("llama").double(), bank, train="all", top_k=3)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(3):
        model(**inputs_for("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layer = mixtures(model)["model.layers.0.self_attn.v_proj"]
    ranks = layer.molora_layout["default"].all_ranks
    assert ranks == (3, 1, 1)
    assert layer.molora_B["default"][:, :3].any()
    assert not layer.molora_A["default"][3:].any()
    assert not layer.molora_B["default"][:, 3:].any()


def test_saved_and_loaded_again(bank: dict[str, Path], tmp_path: Path) -> None:
    model = mixture_of(build("llama").double(), bank)
    train_a_step(model, inputs_for("llama"))
    save(model, tmp_path)
    again = PeftModel.from_pretrained(build("llama").double(), str(tmp_path))
    config = again.peft_config["default"]
    assert config.expert_names == list(MIXED)
    assert config.task_type == "CAUSAL_LM"
    assert torch.equal(logits(again, inputs_for("llama")), logits(model, inputs_for("llama")))


def test_names(bank: dict[str, Path]) -> None:
    folders = list(bank.values())
    assert mixture_of(build("llama"), folders).peft_config["default"].expert_names == list(MIXED)
    named = mixture_of(build("llama"), folders, names=["x", "y", "z"])
    assert named.peft_config["default"].expert_names == ["x", "y", "z"]
    for adapters, names, says in (
        (folders, ["x", "y"], "3 different names"),
        (folders, ["x", "y", "x"], "3 different names"),
        ([folders[0], folders[0]], None, r"2 different names.*Set names="),
        (bank, ["x", "y", "z"], "unset where the adapters come with names"),
        ([], None, "at least one adapter folder"),
        (str(folders[0]), None, "Put it into a list"),
    ):
        with pytest.raises(GuilomoError, match=says):
            mixture_of(build("llama"), adapters, names=names)


def test_heads_that_are_equal_are_kept_and_others_need_a_choice(tmp_path: Path) -> None:
    folders = save_bank(tmp_path, BERT, "bert")
    with pytest.raises(GuilomoError, match=r"'a' and 'b' differ in .*classifier.*saved_from='a'"):
        mixture_of(build("bert").double(), _with_other_head(folders))
    with pytest.raises(GuilomoError, match=r"saved_from = 'c'.*one of a, b"):
        mixture_of(build("bert").double(), folders, saved_from="c")
    head = load_file(folders["a"] / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    model = mixture_of(build("bert").double(), folders, saved_from="a")
    assert torch.equal(model.base_model.model.classifier.modules_to_save["default"].weight, head)
    model.save_pretrained(tmp_path / "mixture")
    again = PeftModel.from_pretrained(build("bert").double(), str(tmp_path / "mixture"))
    assert torch.equal(logits(again, inputs_for("bert")), logits(model, inputs_for("bert")))


def _with_other_head(folders: dict[str, Path]) -> dict[str, Path]:
    path = folders["b"] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.weight"] += 1
    save_file(tensors, path)
    return folders


def test_a_head_of_another_number_of_labels(tmp_path: Path) -> None:
    folders = save_bank(tmp_path, BERT, "bert")
    path = folders["a"] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.classifier.weight"] = torch.zeros(7, 32)
    save_file(tensors, path)
    with pytest.raises(GuilomoError, match=r"classifier\.weight' = \(7, 32\).*expected \(3, 32\).*as many labels"):
        mixture_of(build("bert").double(), folders, saved_from="a")


def test_copies_of_the_output_layer_are_no_change(bank: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves the embeddings beside an adapter of the output layer."""
    assert any(key.startswith("lm_head") for key in read_adapter(bank["code"]).others)
    folder = save_adapter(tmp_path / "code", **MIXED["code"])
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lm_head.base_layer" in key)
    save_file({**tensors, key: tensors[key] + 1}, path)
    with pytest.raises(GuilomoError, match=r"lm_head\.base_layer\.weight.*not the base model's"):
        mixture_of(build("llama").double(), [folder])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, r"use_dora = True.*train it without use_dora"),
        ({"bias": "all"}, r"bias = 'all'.*bias='none'"),
        ({"lora_bias": True}, r"lora_bias = True.*lora_bias=False"),
        ({"target_modules": ["embed_tokens"]}, r"lora_embedding_A.*lora_A and lora_B of linear modules"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices.*no experts"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights = 'olora'.*changes the frozen weights"),
        ({"layer_replication": [(0, 2), (1, 2)]}, r"layer_replication.*convert_to_lora"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    kind = {"target_modules": ["q_proj", "v_proj"], **options}
    config = LoraConfig(**kind)
    # The tiny Llama has no biases, and PEFT replicates layers of a few architectures only.
    missing = {"layer_replication", "lora_bias"}
    model = get_peft_model(build("llama"), LoraConfig(**{k: v for k, v in kind.items() if k not in missing}))
    save(model, tmp_path / "odd")
    if missing & options.keys():
        config.save_pretrained(str(tmp_path / "odd"))
    with pytest.raises(GuilomoError, match=rf"adapter 'odd'.*{says}"):
        mixture_of(build("llama"), [tmp_path / "odd"])


def test_other_methods_bases_and_files_are_refused(bank: dict[str, Path], tmp_path: Path) -> None:
    get_peft_model(build("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    save(mixture_of(build("llama"), bank), tmp_path / "mixture")
    save_adapter(tmp_path / "gpt2", "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    pickled = save_adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for folder, says in (
        ("ia3", r"peft_type = 'IA3'.*'LORA'"),
        ("mixture", r"peft_type = 'MOLORA'.*that it was made of"),
        ("gpt2", r"module = 'transformer.*one of the model's 15 linears.*trained on"),
        ("pickled", r"is a pickle"),
        ("nowhere", r"a folder with adapter_config\.json.*downloaded first"),
    ):
        with pytest.raises(GuilomoError, match=says):
            mixture_of(build("llama"), [tmp_path / folder])
    with pytest.raises(GuilomoError, match=r"\(in, out\) of 'model\.layers.*\(48, 32\).*expected \(48, 64\)"):
        mixture_of(_wide_llama(), [bank["math"]])
    with pytest.raises(GuilomoError, match=r"model = 'PeftModel.*expected the base model"):
        mixture_of(alone(bank["math"]), bank)


def _wide_llama() -> Any:
    from tiny_models import llama

    return llama(hidden_size=64)


def test_weights_and_configuration_that_disagree(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "one")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for content, says in (
        (json.dumps({**config, "r": 7}), r"rank of 'model.*expected 7"),
        (json.dumps([1]), "is not the configuration of an adapter"),
        ("{", "is not the configuration of an adapter"),
        (json.dumps({}), "is not the configuration of an adapter"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(GuilomoError, match=says):
            read_adapter(folder)
    path.write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[next(key for key in tensors if "lora_B" in key)]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(GuilomoError, match="lacks lora_B"):
        read_adapter(folder)


def test_adapters_that_name_other_bases_are_warned_of(tmp_path: Path) -> None:
    folders = save_bank(tmp_path, {"a": {}, "b": {}})
    for name, folder in folders.items():
        path = folder / "adapter_config.json"
        content = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": f"base-{name}"}
        path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match="name different base models: base-a, base-b"):
        mixture_of(build("llama"), folders)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r": 3}, "r = 3.*follows from the adapters"),
        ({"balance_los": "switch"}, "option = 'balance_los'.*Did you mean 'balance_loss'"),
        ({"top_k": 0}, "top_k = 0.*at least 1"),
        ({"train": "routers"}, "train = 'routers'.*Did you mean 'router'"),
        ({"router": "fixed"}, "train = 'router'.*nothing to train"),
    ],
)
def test_options(bank: dict[str, Path], options: dict[str, Any], says: str) -> None:
    with pytest.raises(GuilomoError, match=says):
        mixture_of(build("llama"), bank, **options)
