"""Full experts as low-rank changes (FlexMoRE): factors, mixtures of whole models, their life on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from adapter_tools import logits, reload
from guilomo import GuilomoError
from guilomo.layers.routers import cost_of_router
from guilomo.sparse_moe import balanced_factors, effective_rank, extracted_mixture, sparse_blocks
from guilomo.tuner import FeedForwardLayer

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = 12
"""The highest rank that a change of these sizes can have."""


def flex_olmo() -> tuple[nn.Module, nn.Module]:
    sparse = FlexOlmoForCausalLM(FlexOlmoConfig(**SIZES, num_experts=4, num_experts_per_tok=2))
    return sparse, Olmo2ForCausalLM(
        Olmo2Config(**SIZES, rms_norm_eps=1e-6, rope_parameters=sparse.config.rope_parameters)
    )


def mixtral() -> tuple[nn.Module, nn.Module]:
    sparse = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-6))
    dense = MistralConfig(**SIZES, rope_parameters=sparse.config.rope_parameters, sliding_window=None)
    return sparse, MistralForCausalLM(dense)


PAIRS = {"flex_olmo": flex_olmo, "mixtral": mixtral}


def _pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A sparse model with experts and routers far from zero, and the dense model of its expert 0; float64."""
    torch.manual_seed(0)
    sparse, dense = (m.double().eval() for m in PAIRS[name]())
    sparse.set_experts_implementation("eager")
    with torch.no_grad():
        for key, parameter in sparse.named_parameters():
            if ".mlp." in key:
                parameter.normal_(std=1.0 if key.endswith("gate.weight") else 0.3)
    _teach(sparse, dense)
    return sparse, dense


@torch.no_grad()
def _teach(sparse: nn.Module, dense: nn.Module) -> None:
    """The dense model takes over all weights of the sparse one, and expert 0 for its feed-forwards."""
    left = dense.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".mlp." not in k}, strict=False)
    assert all(".mlp." in key for key in left.missing_keys)
    assert not left.unexpected_keys
    for name, block in sparse_blocks(sparse).items():
        mlp = dense.get_submodule(name)
        for linear, weight in zip(
            ("gate_proj", "up_proj", "down_proj"), (block.gate, block.up, block.down), strict=True
        ):
            mlp.get_submodule(linear).weight.copy_(weight[0])


def _inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1))}


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = layer(x)
    return found


def _by_hand(sparse: nn.Module, name: str, x: Tensor) -> Tensor:
    """``sum_e p_e W_down^e (silu(W_gate^e x) * W_up^e x)``, token by token, from the sparse model's own parameters."""
    block = sparse_blocks(sparse)[name]
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        p = torch.softmax(block.router @ token, 0)
        kept = p.argsort(descending=True)[: block.top_k]
        total = p[kept].sum() if block.renormalised else 1.0
        rows.append(
            sum(
                p[e] / total * block.down[e] @ (nn.functional.silu(block.gate[e] @ token) * (block.up[e] @ token))
                for e in kept.tolist()
            )
        )
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (5, 5)])
def test_error_is_the_singular_tail(shape: tuple[int, int]) -> None:
    """Monotone in the rank, zero at full rank, and norms of the factors are balanced."""
    change = torch.randn(*shape, dtype=torch.float64)
    s = torch.linalg.svdvals(change)
    errors = []
    for rank in range(min(shape) + 3):
        pair = balanced_factors(change, rank)
        assert pair.rank == min(rank, min(shape))
        assert torch.allclose(pair.a.norm(dim=1), pair.b.norm(dim=0), rtol=1e-10)
        errors.append(float((pair.b @ pair.a - change).norm()))
        assert errors[-1] == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-12)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(float(change.norm()))
    assert errors[min(shape)] < 1e-12


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(7)) == 7
    assert effective_rank(torch.tensor([5.0, 0.0, 0.0])) == 1
    assert effective_rank(torch.zeros(4)) == 0
    assert effective_rank(torch.tensor([1.0, 1.0, 5e-4, 5e-4])) == 2, "negligible values do not count"
    s = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(s) == 3  # exp(1.5 ln 2) = 2.83
    change = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64))[0][:, :4] @ torch.randn(4, 8, dtype=torch.float64)
    assert balanced_factors(change, "effective").rank == effective_rank(torch.linalg.svdvals(change)) <= 4


@pytest.mark.parametrize("name", PAIRS)
def test_full_rank_reproduces_the_sparse_model(name: str) -> None:
    """Blocks in float64 against the equation, to 1e-10; against transformers, whose routers compute in float32."""
    sparse, dense = _pair(name)
    base = logits(dense, _inputs())
    wanted = logits(sparse, _inputs())
    model = extracted_mixture(sparse, dense, ranks=FULL)
    assert torch.allclose(logits(model, _inputs()), wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - base).abs().max() > 1e-2
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for block in sparse_blocks(sparse):
        ours = _output(model.get_base_model().get_submodule(block), x)
        assert torch.allclose(ours, _by_hand(sparse, block, x), rtol=1e-9, atol=1e-10)
        assert torch.allclose(ours, _output(sparse.get_submodule(block), x), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, _inputs()), base)


@pytest.mark.parametrize("name", PAIRS)
def test_lower_ranks_are_the_truncated_experts(name: str) -> None:
    """One rank per expert: the block is that of experts rebuilt from their truncated changes."""
    sparse, dense = _pair(name)
    model = extracted_mixture(sparse, dense, ranks=[0, 3, 1, "effective"])
    plan = model.peft_config["default"].plan
    ranks = plan["model.layers.0.mlp.gate_proj"].ranks
    assert ranks[:3] == (0, 3, 1)
    assert 1 < ranks[3] <= FULL
    with torch.no_grad():
        for block in sparse_blocks(sparse).values():
            linears = zip(("gate_proj", "up_proj", "down_proj"), (block.gate, block.up, block.down), strict=True)
            for linear, weights in linears:
                for expert, rank in enumerate(plan[f"{block.name}.{linear}"].ranks):
                    u, s, vh = torch.linalg.svd(weights[expert] - weights[0], full_matrices=False)
                    weights[expert] = weights[0] + u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for block in sparse_blocks(sparse):
        ours = _output(model.get_base_model().get_submodule(block), x)
        assert torch.allclose(ours, _by_hand(sparse, block, x), rtol=1e-9, atol=1e-10)


def test_what_an_expert_costs() -> None:
    """Every expert ``sum_m r_m (d_in + d_out)`` and one row of the router, the base expert the row alone."""
    sparse, dense = _pair("flex_olmo")
    model = extracted_mixture(sparse, dense, ranks=[0, 3, 1, 5])
    plan = model.peft_config["default"].plan
    wanted = 2 * (3 * (3 + 1 + 5) * (16 + 12) + 4 * 16)
    assert plan.parameters(cost_of_router("topk_of_softmax")) == wanted
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted


@pytest.mark.parametrize("name", PAIRS)
def test_base_only_routing_is_the_dense_feed_forward(name: str) -> None:
    """A router that is sure of expert 0: to the last bit."""
    sparse, dense = _pair(name)
    model = extracted_mixture(sparse, dense, ranks=FULL)
    x = torch.rand(2, 5, 16, dtype=torch.float64) + 0.1
    mlp = model.get_base_model().get_submodule("model.layers.0.mlp")
    other = _output(mlp, x)
    with torch.no_grad():
        weight = mlp.gate_proj.molora_router["default"].weight
        weight.zero_()
        weight[0] = 1000.0
    found = _output(mlp, x)
    with model.disable_adapter():
        assert torch.equal(found, _output(mlp, x))
    assert not torch.allclose(found, other)


def test_padded_ranks_change_nothing() -> None:
    """Rank rows of zeros, all experts at one rank: the ragged mixture again."""
    sparse, dense = _pair("flex_olmo")
    model = extracted_mixture(sparse, dense, ranks=[0, 3, 1, 5])
    sparse, dense = _pair("flex_olmo")
    padded = extracted_mixture(sparse, dense, ranks=[0, 5, 5, 5])
    for layer, wide in zip(_layers(model), _layers(padded), strict=True):
        a, b = layer.molora_A["default"], layer.molora_B["default"]
        with torch.no_grad():
            wide.molora_A["default"].zero_()
            wide.molora_B["default"].zero_()
            start = 0
            for expert, rank in enumerate((3, 1, 5)):
                wide.molora_A["default"][5 * expert : 5 * expert + rank] = a[start : start + rank]
                wide.molora_B["default"][:, 5 * expert : 5 * expert + rank] = b[:, start : start + rank]
                start += rank
    assert torch.allclose(logits(padded, _inputs()), logits(model, _inputs()), rtol=1e-6, atol=1e-7)


def _layers(model: PeftModel) -> list[FeedForwardLayer]:
    return [m for m in model.modules() if isinstance(m, FeedForwardLayer)]


@pytest.mark.parametrize("name", PAIRS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    sparse, dense = _pair(name)
    model = extracted_mixture(sparse, dense, ranks=[0, 3, 1, "effective"])
    wanted = logits(model, _inputs())
    model.save_pretrained(tmp_path)
    again = reload(_pair(name)[1], tmp_path, autocast_adapter_dtype=False)
    assert again.peft_config["default"].plan == model.peft_config["default"].plan
    assert torch.equal(logits(again.double(), _inputs()), wanted)


def test_no_expert_is_the_base() -> None:
    """A dense feed-forward that is none of the experts: all of them are changes of it."""
    sparse, dense = _pair("mixtral")
    with torch.no_grad():
        for key, parameter in dense.named_parameters():
            if ".mlp." in key:
                parameter.normal_(std=0.3)
    with pytest.raises(GuilomoError, match=r"Expert 0 of the sparse model is not.*gate_proj.*or None"):
        extracted_mixture(sparse, dense, ranks=FULL)
    model = extracted_mixture(sparse, dense, ranks=FULL, base_expert=None)
    assert torch.allclose(logits(model, _inputs()), logits(sparse, _inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([0, 1, 2], r"ranks = \[0, 1, 2\].*each of the 4 experts, 0 for expert 0"),
        ([1, 1, 2, 3], r"ranks = \[1, 1, 2, 3\].*0 for expert 0"),
        (-1, r"rank = -1.*at least 0, or 'effective'"),
        ("best", r"rank = 'best'.*at least 0, or 'effective'"),
    ],
)
def test_ranks_that_cannot_be_used(ranks: Any, message: str) -> None:
    sparse, dense = _pair("mixtral")
    with pytest.raises(GuilomoError, match=message):
        extracted_mixture(sparse, dense, ranks=ranks)


def test_models_that_do_not_belong_together() -> None:
    sparse, dense = _pair("mixtral")
    with pytest.raises(GuilomoError, match=r"model = 'MistralForCausalLM'.*fused 3-D"):
        extracted_mixture(dense, dense, ranks=1)
    with torch.no_grad():
        dense.model.norm.weight += 1
    with pytest.raises(GuilomoError, match=r"differ in 'model\.norm\.weight' \(1 in all\)"):
        extracted_mixture(sparse, dense, ranks=1)
    wide = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 20})).double()
    wide.load_state_dict({k: v for k, v in sparse.state_dict().items() if ".mlp." not in k}, strict=False)
    with pytest.raises(GuilomoError, match=r"shape of \S+gate_proj = \(20, 16\).*\(12, 16\)"):
        extracted_mixture(sparse, wide, ranks=1)


def test_blocks_that_cannot_be_read() -> None:
    shared = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8))
    with pytest.raises(GuilomoError, match=r"mlp' cannot be read: it has the part 'shared_expert'"):
        sparse_blocks(shared)
    sparse, _ = _pair("mixtral")
    router = sparse.model.layers[1].mlp.gate
    router.forward = lambda x: (None, x.sigmoid()[:, :2], torch.zeros(len(x), 2, dtype=torch.long))
    with pytest.raises(GuilomoError, match=r"layers\.1\.mlp' \(MixtralTopKRouter\) is not the top-k of a softmax"):
        sparse_blocks(sparse)
