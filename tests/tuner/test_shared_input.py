"""Linears that read the same x: one product for all of them, and each alone where the guess is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from adapter_tools import attach
from guilomo.layers import fused
from guilomo.layers.paths import using
from guilomo.tuner import shared_input


class Attention(nn.Module):
    """Three linears of one x, or not quite; x may change between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(9, 5), nn.Linear(9, 4, bias=False), nn.Linear(9, 5)
        self.how = "same"

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        if self.how == "changed":
            x.mul_(1.5)
        if self.how == "other":
            x = x * 1.5
        if self.how == "left out":
            return q
        return torch.cat([q, self.k_proj(x), self.v_proj(x)], dim=-1)


@pytest.fixture(params=["fused", "joined"])
def nodes(request: pytest.FixtureRequest) -> Iterator[str]:
    with using(request.param):
        yield request.param


def mixture(**options: object) -> nn.Module:
    pattern = {"q_proj": [3, 1], "k_proj": [2], "v_proj": [1, 2, 2]}
    model = attach(Attention(), target_modules=list(pattern), rank_pattern=pattern, top_k=1, **options)
    return model.double()


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients, of x first; the output alone where x is changed in place, which forbids a backward."""
    if model.base_model.model.how == "changed":
        with torch.no_grad():
            return [model(x.clone())]
    leaf = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(leaf * 1.0)  # not the leaf itself, which may not be changed in place
    return [
        y,
        *(g for g in torch.autograd.grad(y.square().sum(), [leaf, *trained], allow_unused=True) if g is not None),
    ]


@pytest.mark.parametrize("how", ["same", "changed", "other", "left out"])
def test_together_equals_alone(how: str, nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mixture(), torch.randn(3, 7, 9, dtype=torch.float64)
    model.base_model.model.how = how
    together = results(model, x)
    monkeypatch.setattr(shared_input, "TOGETHER", ())
    alone = results(model, x)
    used = [g for g in together if g.any()]
    assert len(used) == len([g for g in alone if g.any()])
    for ours, reference in zip(used, (g for g in alone if g.any()), strict=True):
        assert torch.allclose(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_x_is_read_once(grad: bool, nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, whole = mixture(), [], fused._shrunk

    def counting(x: Tensor, members: list[fused.Member], *args: object, **options: object) -> list[fused.Shrunk]:
        calls.append(len(members))
        return whole(x, members, *args, **options)

    monkeypatch.setattr(fused, "_shrunk", counting)
    with torch.set_grad_enabled(grad):
        for how, wanted in (("same", [3]), ("other", [3, 3]), ("changed", [3, 3]), ("left out", [3])):
            model.base_model.model.how = how
            calls.clear()
            model(torch.randn(4, 9, dtype=torch.float64) * 1.0)
            assert calls == wanted


def test_nothing_is_kept_after_the_pass(nodes: str) -> None:
    model = mixture()
    model.base_model.model.how = "left out"
    layer = model.base_model.model.q_proj
    model(torch.randn(2, 9, dtype=torch.float64))
    assert layer.context.shared._aside == {}


def test_layers_that_differ_compute_alone(nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged, dropped-out, hooked or half-precision neighbour is left to itself."""
    seen: list[int] = []
    whole = fused._shrunk
    monkeypatch.setattr(
        fused, "_shrunk", lambda x, members, *a, **o: seen.append(len(members)) or whole(x, members, *a, **o)
    )
    x = torch.randn(4, 9, dtype=torch.float64)
    model = mixture()
    k = model.base_model.model.k_proj
    k.merge()
    model(x)
    assert seen == [2]
    k.unmerge()
    seen.clear()
    handle = k.register_forward_pre_hook(lambda module, args: None)
    model(x)
    assert seen == [2, 3]  # the hooked one may go first for the others, but not be gone first for
    handle.remove()
    seen.clear()
    results(mixture(lora_dropout=0.2).train(), x)
    assert seen == [1, 1, 1]


def test_tensors_of_inference_mode(nodes: str) -> None:
    model, x = mixture(), torch.randn(3, 9, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), wanted)


def test_keys_and_values_of_cross_attention_are_not_asked_of_the_query() -> None:
    model = nn.ModuleDict({"cross_attn": Attention(), "self_attn": Attention()})
    adapted = attach(model, target_modules=["q_proj", "k_proj", "v_proj"])
    shared = adapted.base_model.model["self_attn"].q_proj.context.shared
    found = {name: [c.layer.name for c in shared.companions(layer)] for name, layer in shared.layers.items()}
    assert found["self_attn.k_proj"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert found["cross_attn.k_proj"] == []


def test_a_copied_model_asks_its_own_layers(nodes: str) -> None:
    model, x = mixture(), torch.randn(3, 9, dtype=torch.float64)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(x)
        model.base_model.model.k_proj.molora_A["default"].zero_()
        assert torch.equal(copied(x), wanted)
