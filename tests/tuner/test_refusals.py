"""Errors name the field, the value and the remedy; what cannot work is refused before anything is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftMixedModel, get_peft_model

from adapter_tools import attach, logits
from guilomo import Allocation, GuilomoError, LoraMoeConfig, ModulePlan
from guilomo.tuner.registration import register
from tiny_models import build, inputs_for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5, "num_experts": 4}, r"top_k = 5.*at most num_experts = 4.*Lower top_k"),
        ({"r": 0}, r"r = 0.*at least 1"),
        ({"r": 2.5}, r"r = 2\.5.*whole number"),
        ({"num_experts": 0}, r"num_experts = 0.*at least 1"),
        ({"top_k": 0}, r"top_k = 0.*at least 1"),
        ({"lora_dropout": 1.0}, r"lora_dropout = 1\.0.*\[0, 1\)"),
        ({"router": "top-k"}, r"router = 'top-k'.*Did you mean 'topk'"),
        ({"balance_loss": "swtich"}, r"balance_loss = 'swtich'.*Did you mean 'switch'"),
        ({"scaling": "alpha_over_rank"}, r"scaling = 'alpha_over_rank'.*Did you mean 'alpha_over_r'"),
        ({"balance_over": "modules"}, r"balance_over = 'modules'.*Did you mean 'module'"),
        ({"balance_reduction": "avg"}, r"balance_reduction = 'avg'.*mean, sum"),
        ({"balance_coefficient": -0.1}, r"balance_coefficient = -0\.1.*at least 0"),
        ({"z_loss_coefficient": float("nan")}, r"z_loss_coefficient = nan.*at least 0"),
        ({"router_options": {"weights": [0.5, 0.5]}}, r"router_options name = 'weights'.*none: router='topk' has none"),
        (
            {"router": "fixed", "router_options": {"weigths": 1}},
            r"name = 'weigths'.*Did you mean 'weights'",
        ),
        (
            {"router": "fixed", "router_options": {"weights": [0.0, 1.0]}},
            r"options\['weights'\].*positive numbers",
        ),
        ({"router_loss_coefficient": 1.0}, r"router_loss_coefficient = 1\.0.*no loss of its own.*sparsegen"),
        ({"router": "task"}, r"router_options\['tasks'\] = None.*router_options=\{'tasks': 3\}"),
        ({"router_loss_coefficient": -1.0}, r"router_loss_coefficient = -1\.0.*at least 0"),
        ({"balance_options": {"delta": 0.1}}, r"balance_options name = 'delta'.*none: balance_loss='switch' has none"),
        (
            {"balance_loss": "localized", "balance_options": {"detla": 0.1}},
            r"balance_options name = 'detla'.*Did you mean 'delta'",
        ),
        (
            {"balance_loss": "divergence", "balance_options": {"certain": 0.99}},
            r"balance_options\['certain'\] = 0\.99.*at most 0\.98",
        ),
        (
            {"balance_loss": "rsl", "balance_options": {"entropy_sign": 0}},
            r"balance_options\['entropy_sign'\] = '0'.*-1, 1",
        ),
        ({"bias": "all"}, r"bias = 'all'.*'none'.*modules_to_save"),
    ],
)
def test_config(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        LoraMoeConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query"]}, r"target_modules = .*query.*this model has .*q_proj"),
        ({"target_modules": ["input_layernorm"]}, r"target_modules = 'model\.layers\.0\.input_layernorm'.*RMSNorm"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"'model\.embed_tokens'.*Embedding.*modules_to_save"),
        ({"rank_pattern": {"query": 4}}, r"rank_pattern = 'query'.*q_proj"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern for model\.layers\.0\.self_attn\.q_proj = 0"),
        ({"rank_pattern": {"q_proj": [2, 0]}}, r"rank_pattern for .*q_proj = \[2, 0\]"),
        (
            {"router": "fixed", "router_options": {"weights": [0.5, 0.5]}},
            r"\['weights'\] = \[0\.5, 0\.5\].*3 positive",
        ),
    ],
)
def test_targets_and_patterns(options: dict[str, Any], message: str) -> None:
    base = build("llama")
    with pytest.raises(GuilomoError, match=message):
        attach(base, **options)


def test_unknown_architecture_needs_targets() -> None:
    with pytest.raises(GuilomoError, match=r"target_modules is not set.*all-linear"):
        attach(torch.nn.Sequential(torch.nn.Linear(3, 3)), target_modules=None)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.self_attn.q_prj", (32, 32), r"q_prj'.*Did you mean .*q_proj"),
        ("model.layers.0.self_attn.q_proj", (32, 33), r"\(32, 33\).*expected \(32, 32\).*another model"),
    ],
)
def test_a_plan_for_another_model(name: str, shape: tuple[int, int], message: str) -> None:
    plan = Allocation({name: ModulePlan(*shape, ranks=(2, 2))})
    with pytest.raises(GuilomoError, match=message):
        attach(build("llama"), allocation=plan)


def test_a_plan_without_experts() -> None:
    plan = Allocation({"lm_head": ModulePlan(32, 64)})
    with pytest.raises(GuilomoError, match=r"no experts"):
        attach(build("llama"), allocation=plan)


def test_nothing_is_wrapped_when_a_target_is_refused() -> None:
    base = build("llama")
    before = {n: type(m) for n, m in base.named_modules()}
    with pytest.raises(GuilomoError):
        attach(base, target_modules=["q_proj", "embed_tokens"])
    assert {n: type(m) for n, m in base.named_modules()} == before


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("router", ["topk", "dense"])
def test_token_dependent_gates_are_never_merged(router: str, merge: str) -> None:
    """Also where the first modules could be merged: refused before any weight is touched."""
    model = attach(build("llama"), router=router, rank_pattern={r"layers\.0\..*": [4]})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(GuilomoError, match=r"layers\.1\.\S+' of adapter 'default' cannot be merged.*router='fixed'"):
        getattr(model, merge)()
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert logits(model, inputs_for("llama")).isfinite().all()


def test_mixed_models_are_refused_with_a_reason() -> None:
    config = LoraMoeConfig(target_modules="all-linear")
    with pytest.raises(ValueError, match=r"MOLORA"):
        get_peft_model(build("llama"), config, mixed=True)
    with pytest.raises(ValueError, match=r"MOLORA"):
        PeftMixedModel(build("llama"), config)


def test_registration_twice_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import mapping

    register()
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "MOLORA", dict)
    with pytest.raises(GuilomoError, match=r"already has a method called MOLORA.*Install a version"):
        register()
