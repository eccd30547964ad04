"""Models fine-tuned from one base as low-rank experts of its feed-forwards (FlexMoRE)."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import guilomo.sparse_moe.models
from adapter_tools import logits, reload, train_a_step
from expert_tools import expert_of, experts_of, linears_of, save_experts, send_everything_to
from guilomo import GuilomoError
from guilomo.layers.routers import ROUTERS
from guilomo.sparse_moe import Extraction, extraction_of_models, feed_forwards, mixture_of_models, models_in
from guilomo.sparse_moe.factors import change_of
from guilomo.tuner import LoraMoeLayer
from tiny_models import build, inputs_for, llama

BLOCKS = {
    "llama": ("model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj")),
    "bert": ("bert.encoder.layer.0", ("intermediate.dense", "output.dense")),
    "gpt2": ("transformer.h.0.mlp", ("c_fc", "c_proj")),
    "vit": ("vit.layers.0.mlp", ("fc1", "fc2")),
}
"""The first feed-forward of each architecture, found by the names of its linears."""
FULL = 99


def base_of(name: str) -> Any:
    return build(name).double().eval()


def layers(model: PeftModel) -> dict[str, LoraMoeLayer]:
    return {m.name: m for m in model.modules() if isinstance(m, LoraMoeLayer)}


def factors(model: PeftModel) -> dict[str, Tensor]:
    parts = {"A": "molora_A", "B": "molora_B"}
    return {
        f"{n}.{k}": getattr(m, part)["default"].detach() for n, m in layers(model).items() for k, part in parts.items()
    }


def truncated(base: nn.Module, expert: nn.Module, linear: str, rank: int) -> Tensor:
    """The expert's weight with its change cut to a rank."""
    ours, theirs = (model.get_parameter(f"{linear}.weight").detach() for model in (base, expert))
    u, s, vh = torch.linalg.svd(theirs - ours, full_matrices=False)
    return ours + u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_found(name: str) -> None:
    block, linears = BLOCKS[name]
    assert feed_forwards(build(name))[block] == tuple(f"{block}.{linear}" for linear in linears)


@pytest.mark.parametrize("name", BLOCKS)
def test_full_rank_reproduces_every_expert(name: str) -> None:
    """Forced onto an expert it is that model, in float64; forced onto expert 0 the base, to the last bit."""
    experts, x = experts_of(base_of(name)), inputs_for(name)
    plain = logits(base_of(name), x)
    model = mixture_of_models(base_of(name), experts, FULL)
    for number, expert in enumerate(experts.values(), start=1):
        wanted = logits(expert, x)
        send_everything_to(model, number)
        assert torch.allclose(logits(model, x), wanted, rtol=1e-9, atol=1e-10)
        assert (wanted - plain).abs().max() > 1e-3
    send_everything_to(model, 0)
    assert torch.equal(logits(model, x), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), plain)


@pytest.mark.parametrize("name", BLOCKS)
def test_ranks_by_name(name: str) -> None:
    """Every expert is the model whose changes are cut to its rank; one of rank 0 is the base."""
    base = base_of(name)
    experts, x = experts_of(base), inputs_for(name)
    plain = logits(base, x)
    model = mixture_of_models(base_of(name), experts, {"code": 0, "law": 3, "maths": "effective"})
    plan = model.peft_config["default"].plan
    assert plan.strategy == "extracted from full experts"
    assert model.peft_config["default"].expert_names == ["base", "law", "maths", "code"]
    effective = {linear: plan[linear].ranks[2] for linear in linears_of(base)}
    assert {plan[linear].ranks for linear in effective} == {(0, 3, rank, 0) for rank in effective.values()}
    assert all(3 < rank <= 32 for rank in effective.values())
    for number, ranks in enumerate((dict.fromkeys(effective, 3), effective, dict.fromkeys(effective, 0)), start=1):
        expert = list(experts.values())[number - 1]
        weights = {linear: truncated(base, expert, linear, rank) for linear, rank in ranks.items()}
        with torch.no_grad():
            for linear, weight in weights.items():
                expert.get_parameter(f"{linear}.weight").copy_(weight)
        send_everything_to(model, number)
        found = logits(model, x)
        assert torch.allclose(found, logits(expert, x), rtol=1e-9, atol=1e-10)
        assert torch.equal(found, plain) == (number == 3)


def test_ranks_in_order_and_for_all() -> None:
    base = base_of("llama")
    first = linears_of(base)[0]
    for ranks, wanted in (
        ([1, 2, 3], (0, 1, 2, 3)),
        (2, (0, 2, 2, 2)),
        ({"maths": 0, "law": 1, "code": 4}, (0, 1, 0, 4)),
    ):
        assert extraction_of_models(base, experts_of(base), ranks).plan[first].ranks == wanted


def test_what_no_expert_changes_is_left_plain() -> None:
    """A linear that an expert leaves has rank 0 whatever was asked for; a block that all leave has no router."""
    base = base_of("llama")
    experts = {"down": expert_of(base, 0, "layers.1.mlp.down_proj"), "up": expert_of(base, 1, "layers.1.mlp.up_proj")}
    x, wanted = inputs_for("llama"), logits(experts["down"], inputs_for("llama"))
    model = mixture_of_models(base_of("llama"), experts, FULL)
    plan = model.peft_config["default"].plan
    block = "model.layers.1.mlp"
    assert {name: module.ranks for name, module in plan.modules.items()} == {
        f"{block}.gate_proj": (0, 0, 0),
        f"{block}.up_proj": (0, 0, 32),
        f"{block}.down_proj": (0, 32, 0),
    }
    send_everything_to(model, 1)
    assert torch.allclose(logits(model, x), wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("train", ["router", "all"])
def test_what_is_trained(name: str, train: str, tmp_path: Path) -> None:
    """Routers alone, or factors too, exactly; also after loading; and a step moves nothing else."""
    base = build(name)
    heads = {"task_type": "SEQ_CLS"} if name == "bert" else {}
    model = mixture_of_models(build(name), experts_of(base), [3, 0, "effective"], train=train, **heads)
    routes, linears = [block[0] for block in feed_forwards(base).values()], linears_of(base)
    wanted = {f"base_model.model.{linear}.molora_router.default.weight" for linear in routes}
    if train == "all":
        wanted |= {f"base_model.model.{linear}.molora_{part}.default" for linear in linears for part in "AB"}
    if heads:
        wanted |= {f"base_model.model.classifier.modules_to_save.default.{part}" for part in ("weight", "bias")}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    model.save_pretrained(tmp_path)
    again = reload(build(name), tmp_path, is_trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == wanted
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_a_step(model, inputs_for(name))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= wanted
    assert moved >= {n for n in wanted if "router" in n}


@pytest.mark.parametrize("name", BLOCKS)
def test_it_is_saved_without_the_experts(name: str, tmp_path: Path) -> None:
    base = build(name)
    folder = save_experts(experts_of(base), tmp_path / "experts")
    model = mixture_of_models(build(name), models_in(folder), {"code": 1, "law": 4, "maths": "effective"})
    model.save_pretrained(tmp_path / "adapter")
    shutil.rmtree(folder)
    again = reload(build(name), tmp_path / "adapter")
    x = inputs_for(name)
    assert torch.equal(logits(again, x), logits(model, x))
    assert again.peft_config["default"].plan == model.peft_config["default"].plan


def test_an_extraction_can_be_saved_and_attached_twice(tmp_path: Path) -> None:
    base, x = build("llama"), inputs_for("llama")
    made = extraction_of_models(base, experts_of(base), [3, 0, "effective"])
    made.save(tmp_path / "experts.safetensors")
    found = Extraction.load(tmp_path / "experts.safetensors")
    assert (found.plan, found.names) == (made.plan, made.names)
    assert extraction_of_models(base, experts_of(base), [3, 0, "effective"]).factors.keys() == found.factors.keys()
    outcomes = []
    for extraction in (made, found):
        torch.manual_seed(5)
        outcomes.append(logits(extraction.attach(build("llama")), x))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("name", BLOCKS)
def test_folders_give_what_models_give(name: str, tmp_path: Path) -> None:
    """Also from several files, and, of a classifier, with another head and without one."""
    base = build(name)
    experts = experts_of(base)
    wanted = factors(mixture_of_models(build(name), experts, 4))
    save_experts({"law": experts["law"]}, tmp_path, max_shard_size="20KB")
    assert len(list((tmp_path / "law").glob("*.safetensors"))) > 1
    if name == "bert":
        experts["maths"].classifier = nn.Linear(32, 7)
        experts["maths"].config.num_labels = 7
        experts["code"] = experts["code"].bert
    save_experts({"maths": experts["maths"], "code": experts["code"]}, tmp_path)
    found = factors(mixture_of_models(build(name), [tmp_path / n for n in experts], 4))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_tied_weights(tmp_path: Path) -> None:
    """A checkpoint of a tied model has its embeddings once; an output layer of its own is another model."""
    torch.manual_seed(1)
    tied = llama(tie_word_embeddings=True)
    folder = save_experts({"law": expert_of(tied, 0)}, tmp_path)
    assert extraction_of_models(tied, models_in(folder), 2).plan.adapted()
    untied = llama()
    untied.load_state_dict(tied.state_dict())
    assert extraction_of_models(untied, models_in(folder), 2).plan.adapted()
    with torch.no_grad():
        untied.lm_head.weight += 1
    with pytest.raises(
        GuilomoError, match=r"Expert 'law' differs from the base model in 'lm_head\.weight' \(1 in all\)"
    ):
        extraction_of_models(untied, models_in(folder), 2)


def test_one_expert_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama")
    folder, load = save_experts(experts_of(base), tmp_path), guilomo.sparse_moe.models.loaded
    held: list[weakref.ref[nn.Module]] = []

    def counting(*arguments: Any) -> tuple[nn.Module, set[str]]:
        assert [model for model in held if model() is not None] == []
        found = load(*arguments)
        held.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(guilomo.sparse_moe.models, "loaded", counting)
    extraction_of_models(base, models_in(folder), 2)
    assert len(held) == 3


def test_half_precision(tmp_path: Path) -> None:
    """Experts are loaded in the base's dtype; differences of its numbers are not rounded to it again."""
    base = build("llama").bfloat16()
    folder = save_experts({"law": expert_of(build("llama"), 0)}, tmp_path)
    model = mixture_of_models(base, models_in(folder), FULL)
    name = "model.layers.0.mlp.up_proj"
    weight = expert_of(build("llama"), 0).get_parameter(f"{name}.weight").bfloat16().float()
    change = weight - build("llama").bfloat16().get_parameter(f"{name}.weight").float()
    found = layers(model)[name]
    product = (found.molora_B["default"] @ found.molora_A["default"]).detach()
    assert torch.allclose(product, change, atol=1e-6)
    ours, theirs = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([-2.0078125], dtype=torch.bfloat16)
    assert change_of(theirs, ours) == torch.tensor([theirs.item() - ours.item()])


def test_the_router_can_be_the_papers() -> None:
    base = base_of("llama")
    model = mixture_of_models(base, experts_of(base), 2, router="topk_of_softmax", top_k=1)
    assert {type(m) for layer in layers(model).values() for m in layer.molora_router.values()} == {
        ROUTERS["topk_of_softmax"]
    }


def test_weights_beside_the_feed_forwards_must_be_the_bases(tmp_path: Path) -> None:
    base = build("bert")
    for name in ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.intermediate.dense.bias"):
        expert = expert_of(base, 0)
        with torch.no_grad():
            expert.get_parameter(name).view(-1)[0] += 1
        with pytest.raises(GuilomoError, match=rf"'law' differs from the base model in '{name}'.*those weights alone"):
            mixture_of_models(base, {"law": expert}, 2)
        save_experts({"law": expert}, tmp_path)
        with pytest.raises(GuilomoError, match=rf"'law' differs from the base model in '{name}'"):
            mixture_of_models(base, [tmp_path / "law"], 2)


def test_experts_of_other_models(tmp_path: Path) -> None:
    base = build("llama")
    for kind, said in (
        (
            {"intermediate_size": 50},
            r"expert 'a': \(out, in\) of 'model\.layers\.0\.mlp\.gate_proj' = \(50, 32\).*\(48, 32\)",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act of the dense model = 'silu'.*'gelu', that of expert 'a'"),
        ({"num_hidden_layers": 1}, r"'a' differs from the base model in 'model\.layers\.1\."),
    ):
        other = llama(**kind)
        other.load_state_dict(
            {
                n: w
                for n, w in base.state_dict().items()
                if n in other.state_dict() and w.shape == other.state_dict()[n].shape
            },
            strict=False,
        )
        with pytest.raises(GuilomoError, match=said):
            mixture_of_models(base, {"a": other}, 2)


def test_a_checkpoint_without_the_feed_forwards(tmp_path: Path) -> None:
    base = build("llama")
    kept = {name: weight for name, weight in base.state_dict().items() if ".mlp." not in name}
    base.save_pretrained(tmp_path / "a", state_dict=kept)
    with pytest.raises(GuilomoError, match=r"expert 'a': \(out, in\) of 'model.layers.0.mlp.gate_proj' = None"):
        mixture_of_models(base, [tmp_path / "a"], 2)


def test_what_a_checkpoint_lacks_is_not_compared(tmp_path: Path) -> None:
    """It would be a number drawn while loading."""
    base, expert = build("llama"), expert_of(build("llama"), 0)
    kept = {name: weight for name, weight in expert.state_dict().items() if not name.startswith("lm_head")}
    expert.save_pretrained(tmp_path / "a", state_dict=kept)
    assert mixture_of_models(base, [tmp_path / "a"], 2).peft_config["default"].plan.adapted()


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([1, 2], r"ranks = \[1, 2\].*one for each of law, maths, code"),
        ({"law": 1}, r"ranks = \{'law': 1\}.*one for each"),
        ({"lwa": 1}, r"expert in ranks = 'lwa'.*Did you mean 'law'"),
        (-1, r"rank = -1.*at least 0, or 'effective'"),
        (True, r"rank = True.*at least 0"),
        ([1, "best", 2], r"rank = 'best'.*at least 0, or 'effective'"),
        (0, r"None of the experts changes a feed-forward of the base model at the ranks .*ranks above 0"),
    ],
)
def test_ranks_that_cannot_be_used(ranks: Any, said: str) -> None:
    base = build("llama")
    with pytest.raises(GuilomoError, match=said):
        mixture_of_models(base, experts_of(base), ranks)


def test_experts_that_learned_nothing() -> None:
    base = build("llama")
    with pytest.raises(GuilomoError, match=r"None of the experts changes .*\{'a': 8\}.*models that were trained"):
        mixture_of_models(base, {"a": build("llama")}, 8)


def test_calls_that_cannot_be(tmp_path: Path) -> None:
    base = build("llama")
    experts = experts_of(base)
    for given, said in (
        ({}, r"experts = \[\].*at least one model"),
        ("experts", r"experts = 'experts'.*several models"),
        (list(experts.values()), r"experts = \['LlamaForCausalLM'.*models by name"),
        ({"base": experts["law"]}, r"names of experts = \['base'\].*expert 0"),
        (["x/law", "y/law"], r"names of experts = \['law', 'law'\]"),
        ({"law": tmp_path}, r"folder of expert 'law' = .*config\.json"),
    ):
        with pytest.raises(GuilomoError, match=said):
            mixture_of_models(base, given, 2)
    for options, said in (
        ({"num_experts": 3}, r"num_experts = 3.*it follows from the experts"),
        ({"rooter": 1}, r"option = 'rooter'.*Did you mean 'router"),
        ({"top_k": 0}, r"top_k = 0"),
        ({"top_k": 1}, r"top_k of model\.layers\.0\.mlp\.gate_proj = 1.*at least 2"),
        ({"feed_forward_blocks": [["a", "b"]]}, r"feed_forward_blocks = .*as LlamaForCausalLM has them"),
    ):
        with pytest.raises(GuilomoError, match=said):
            mixture_of_models(build("llama"), experts, 2, **options)
    with pytest.raises(GuilomoError, match=r"experts = '.*a folder whose subfolders hold config\.json"):
        models_in(tmp_path)


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    base = build("llama")
    save_experts({"law": expert_of(base, 0)}, tmp_path)
    weights = tmp_path / "law" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(GuilomoError, match=r"Expert 'law' in .* cannot be loaded: .*belong together"):
        mixture_of_models(base, models_in(tmp_path), 2)
    weights.unlink()
    torch.save(base.state_dict(), tmp_path / "law" / "pytorch_model.bin")
    with pytest.raises(GuilomoError, match=r"folder of expert 'law' = .*safetensors files"):
        mixture_of_models(base, models_in(tmp_path), 2)
    config = tmp_path / "law" / "config.json"
    weights.write_bytes(content)
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 50}))
    with pytest.raises(GuilomoError, match=r"Expert 'law' in .* cannot be loaded"):
        mixture_of_models(base, models_in(tmp_path), 2)
    with pytest.raises(GuilomoError, match=r"model = 'Sequential'.*of transformers where experts are folders"):
        mixture_of_models(
            nn.Sequential(nn.ModuleDict({"fc1": nn.Linear(3, 4), "fc2": nn.Linear(4, 3)})), models_in(tmp_path), 2
        )
