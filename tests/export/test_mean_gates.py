"""Mean gates are what a loop over rows, tokens and experts gives, and no padding is in them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from guilomo import GuilomoError, LoraMoeConfig
from guilomo.export import mean_gates, refuse_routed
from tiny_models import build, inputs_for


def _mixture(name: str, **options: object) -> torch.nn.Module:
    given = {"num_experts": 3, "r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(build(name).double(), LoraMoeConfig(**given)).double().eval()


def _naive(model: torch.nn.Module, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """Routing weights of one module, collected token by token from the module's own inputs."""
    layer = model.get_base_model().get_submodule(name)
    router, total, tokens = layer.molora_router["default"], torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**batch)
        hook.remove()
        for row, mask in zip(seen[0], batch["attention_mask"], strict=True):
            for token, real in zip(row, mask, strict=True):
                if real:
                    total += router(token[None]).weights[0]
                    tokens += 1
    return total / tokens


@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 1}, {"router": "dense"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_equal_to_a_loop_over_real_tokens(name: str, options: dict[str, object]) -> None:
    model = _mixture(name, **options)
    whole = inputs_for(name)
    batches = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    found = mean_gates(model, batches)
    for module in [n for n in found if n.endswith(("q_proj", "down_proj", "query", "output.dense"))]:
        assert found[module].dtype == torch.float64
        assert torch.allclose(found[module], _naive(model, module, batches), rtol=0, atol=1e-14)


def test_more_padding_changes_nothing() -> None:
    model, whole = _mixture("llama"), inputs_for("llama")
    wider = {k: torch.nn.functional.pad(v, (0, 5), value=9 if k == "input_ids" else 0) for k, v in whole.items()}
    narrow, wide = mean_gates(model, [whole]), mean_gates(model, [wider])
    for name, gates in narrow.items():
        assert torch.allclose(gates, wide[name], rtol=0, atol=1e-14)


def test_a_pooler_counts_rows() -> None:
    model, whole = _mixture("bert"), inputs_for("bert")
    layer = model.get_base_model().bert.pooler.dense
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    found = mean_gates(model, [whole])["bert.pooler.dense"]
    hook.remove()
    assert torch.allclose(found, layer.molora_router["default"](seen[0]).weights.mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "gates"),
    [
        ({"router": "fixed", "router_options": {"weights": [0.5, 0.2, 0.3]}}, [0.5, 0.2, 0.3]),
        ({"num_experts": 1, "top_k": 1}, [1.0]),
    ],
    ids=["fixed", "one expert"],
)
def test_constant_gates_need_no_data(options: dict[str, object], gates: list[float]) -> None:
    model = _mixture("llama", **options)
    refuse_routed(model)
    for found in mean_gates(model, []).values():
        assert torch.allclose(found, torch.tensor(gates, dtype=torch.float64), rtol=0, atol=1e-15)


def test_mode_and_hooks_are_put_back() -> None:
    model = _mixture("llama").train()
    mean_gates(model, [inputs_for("llama")])
    assert model.training
    assert not any(m._forward_pre_hooks for n, m in model.named_modules() if n.endswith("q_proj"))


def test_what_has_no_gates_is_refused() -> None:
    model = _mixture("llama")
    with pytest.raises(GuilomoError, match=r"has seen no token.*Give at least one row"):
        mean_gates(model, [])
    with pytest.raises(GuilomoError, match=r"cannot be merged.*--to stacked or --to svd"):
        refuse_routed(model)
    plain = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(GuilomoError, match="is a LORA adapter"):
        mean_gates(plain, [inputs_for("llama")])
