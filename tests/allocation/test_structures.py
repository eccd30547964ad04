"""Modules that are no plain mixtures: what they cost, how they are written, what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from guilomo import Allocation, GuilomoError, ModulePlan
from guilomo.allocation import find_blocks, lora, no_router, uniform, with_shared_a

LLAMA_7B = {f"model.layers.{i}.self_attn.{p}_proj": (4096, 4096) for i in range(32) for p in "qv"}


def test_counts_of_the_mosld_paper() -> None:
    """LLaMA-2-7B, Q and V, r = 8, 5 experts (arXiv 2412.08946; the counts follow from its formulas)."""
    assert lora(LLAMA_7B, rank=8).parameters() == 4_194_304
    assert uniform(LLAMA_7B, experts=5, rank=8).parameters() == 22_282_240
    shared = {n: ModulePlan(*s, ranks=(8,) * 5, top_k=2, shared_a=True) for n, s in LLAMA_7B.items()}
    assert Allocation(shared).parameters() == 13_893_632


def test_formulas_of_a_shared_a() -> None:
    plan = Allocation({"m": ModulePlan(13, 7, ranks=(3,) * 5, top_k=2, shared_a=True)})
    assert plan.parameters() == 3 * 13 + 5 * 3 * 7 + 5 * 13
    assert plan.parameters(no_router) == 3 * 13 + 5 * 3 * 7
    assert plan.active_parameters(no_router) == 3 * 13 + 2 * 3 * 7
    assert plan.flops_per_token() == 2 * plan.parameters()


def test_sharing_keeps_the_price() -> None:
    plan = Allocation({"a": ModulePlan(13, 7, (2, 3, 1), 2), "b": ModulePlan(5, 40, (1, 1), 1), "c": ModulePlan(9, 9)})
    shared = with_shared_a(plan)
    for name in ("a", "b"):
        before, after = (Allocation({name: p[name]}).parameters() for p in (plan, shared))
        assert 0 <= before - after < plan[name].in_features + plan[name].experts * plan[name].out_features
        assert shared[name].experts == plan[name].experts
    assert shared["c"] == plan["c"]


def test_written_and_read() -> None:
    plain = Allocation({"m": ModulePlan(13, 7, (3, 3))})
    assert "shared_a" not in plain.to_json()
    shared = with_shared_a(plain)
    assert json.loads(shared.to_json())["modules"]["m"]["shared_a"] is True
    assert Allocation.from_json(shared.to_json()) == shared


def test_unequal_ranks_cannot_share() -> None:
    with pytest.raises(GuilomoError, match=r"ranks = \(3, 2\).*equal ranks.*shared_a=False"):
        ModulePlan(13, 7, (3, 2), shared_a=True)


def test_formulas_of_a_sequential_branch() -> None:
    hydra = Allocation({"m": ModulePlan(13, 7, ranks=(4,), top_k=1, sequential_rank=8)}, alpha=16)
    assert hydra.parameters() == 4 * (13 + 7) + 2 * 8 * 7 == hydra.active_parameters()
    assert (hydra.scales("m"), hydra.sequential_scale("m")) == ((4.0,), 2.0)
    alone = Allocation({"m": ModulePlan(13, 7, sequential_rank=8)})
    assert alone.parameters() == 2 * 8 * 7 == alone.active_parameters()
    assert alone.adapted()
    assert Allocation.from_json(alone.to_json()) == alone
    assert hydra.describe_diff(alone) == "m: 1×4 top 1, sequential 8 -> - top 2, sequential 8"


def test_a_sequential_branch_stands_beside_one_expert() -> None:
    with pytest.raises(GuilomoError, match=r"sequential_rank = 2.*0 beside 2 experts"):
        ModulePlan(13, 7, (3, 3), sequential_rank=2)


def _block(top_k: int = 2) -> dict[str, ModulePlan]:
    common = {"ranks": (3,) * 4, "top_k": top_k, "block": "mlp"}
    return {
        "mlp.gate_proj": ModulePlan(13, 11, role="route", **common),
        "mlp.up_proj": ModulePlan(13, 11, role="in", **common),
        "mlp.down_proj": ModulePlan(11, 13, role="out", **common),
    }


def test_formulas_of_a_feed_forward_block() -> None:
    """Experts as in a plain mixture, and one router for all of the block (MixLoRA)."""
    plan = Allocation(_block())
    experts = 4 * 3 * (13 + 11) * 3
    assert plan.parameters() == experts + 4 * 13
    assert plan.active_parameters() == experts / 2 + 4 * 13
    assert plan.parameters(no_router) == experts
    # Per token, A once and B for 2 experts where x is read; A for 2 experts and B once where they are summed.
    assert plan.flops_per_token() == 2 * (2 * 12 * (13 + 2 * 11) + 12 * (2 * 11 + 13) + 4 * 13)
    assert Allocation.from_json(plan.to_json()) == plan
    plain = Allocation({"mlp.up_proj": ModulePlan(13, 11, (3,) * 4)})
    assert "mlp.up_proj: 4×3 top 2 -> 4×3 top 2, in of mlp" in plain.describe_diff(plan)


def test_an_expert_without_rank_only_in_a_block() -> None:
    plan = {n: replace(m, ranks=(0, 3, 1, 2)) for n, m in _block().items()}
    assert Allocation(plan, alpha=6).scales("mlp.up_proj") == (0.0, 2.0, 6.0, 3.0)
    assert Allocation(plan).parameters(no_router) == 3 * 6 * (13 + 11)
    with pytest.raises(GuilomoError, match=r"rank = 0.*at least 1"):
        ModulePlan(13, 11, (0, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.gate_proj": {"role": "in"}}, r"role 'route' in block 'mlp' = 0.*exactly one"),
        ({"mlp.up_proj": {"role": "out"}}, r"role 'out' in block 'mlp' = 2.*exactly one"),
        ({"mlp.up_proj": {"ranks": (3, 3)}}, r"block 'mlp' = \[\(2, 2\), \(4, 2\)\].*the same"),
        ({"mlp.up_proj": {"top_k": 1}}, r"block 'mlp' = \[\(4, 1\), \(4, 2\)\].*the same"),
        ({"mlp.up_proj": {"block": ""}}, r"role = 'in'.*together with the name of a block"),
        ({"mlp.up_proj": {"role": "sum"}}, r"role = 'sum'.*route"),
        ({"mlp.up_proj": {"role": ""}}, r"role = ''.*or neither"),
        ({"mlp.up_proj": {"block": 3}}, r"role = 'in'.*name of a block"),
        ({"mlp.up_proj": {"shared_a": "yes"}}, r"shared_a = 'yes'.*True or False"),
        ({"mlp.up_proj": {"sequential_rank": None}}, r"sequential_rank = None.*at least 1"),
    ],
)
def test_blocks_that_cannot_run(change: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        Allocation({n: replace(m, **change.get(n, {})) for n, m in _block().items()})


def test_blocks_are_found_by_their_names() -> None:
    names = [
        "h.0.attn.c_proj",
        "h.0.mlp.c_fc",
        "h.0.mlp.c_proj",
        "layer.0.attention.output.dense",
        "layer.0.intermediate.dense",
        "layer.0.output.dense",
        "layers.1.mlp.up_proj",
        "layers.1.mlp.gate_proj",
        "layers.1.mlp.down_proj",
        "layers.2.mlp.up_proj",
        "layers.2.mlp.down_proj",
        "fc1",
        "fc2",
    ]
    assert find_blocks(names) == {
        "h.0.mlp": ("h.0.mlp.c_fc", "h.0.mlp.c_proj"),
        "layer.0": ("layer.0.intermediate.dense", "layer.0.output.dense"),
        "layers.1.mlp": ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"),
        "layers.2.mlp": ("layers.2.mlp.up_proj", "layers.2.mlp.down_proj"),
    }
    assert find_blocks(names, [("c_fc", "c_proj")]) == {"h.0.mlp": ("h.0.mlp.c_fc", "h.0.mlp.c_proj")}
