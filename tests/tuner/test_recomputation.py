"""Gradient checkpointing changes nothing: loss, gradients (router losses included) and statistics stay the same."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adapter_tools import attach, gradients
from guilomo.layers import router_statistics
from guilomo.tuner import LoraMoeLayer, context_of
from tiny_models import build, inputs_for

pytestmark = pytest.mark.usefixtures("path")

MODES = ["none", "non-reentrant", "reentrant"]


def _model(mode: str, name: str = "llama", **options: object) -> PeftModel:
    torch.manual_seed(0)
    given = {"balance_coefficient": 0.5, "z_loss_coefficient": 0.1, **options}
    model = attach(build(name), **given).train()
    if mode != "none":
        base = model.get_base_model()
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": mode == "reentrant"})
        base.enable_input_require_grads()
    return model


def _pass(mode: str, factor: float = 1.0, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    model = _model(mode, **options)
    name = options.get("name", "llama")
    loss = model(**inputs_for(str(name))).loss
    (loss * factor).backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("balance_over", ["module", "layer"])
def test_loss_and_gradients(balance_over: str, name: str) -> None:
    # the classifier of BERT has its own layer; the experts of a layer must be equal in number for 'layer'
    loss, wanted = _pass("none", factor=0.5, balance_over=balance_over, name=name)
    for mode in MODES[1:]:
        same_loss, found = _pass(mode, factor=0.5, balance_over=balance_over, name=name)
        assert torch.equal(loss, same_loss)
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert torch.equal(found[key], gradient), f"{mode}: {key}"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("balance_over", ["module", "layer"])
def test_router_loss_is_the_hand_summed_one(balance_over: str, mode: str) -> None:
    """Against the gradient of ``task loss + sum of router losses``, computed from the routings by hand."""
    _, found = _pass(mode, balance_over=balance_over)
    model = _model("none", balance_loss=None, z_loss_coefficient=0.0)
    inputs = inputs_for("llama")
    groups: dict[str, list[object]] = {}
    handles = []
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraMoeLayer):
            group = name if balance_over == "module" else ".".join(name.split(".")[:3])

            def keep(layer: LoraMoeLayer, args: tuple[Tensor, ...], group: str = group) -> None:
                routing = layer.molora_router["default"](args[0])
                groups.setdefault(group, []).append(router_statistics(routing, inputs["attention_mask"]))

            handles.append(layer.register_forward_pre_hook(keep))
    loss = model(**inputs).loss
    for members in groups.values():
        total = members[0]
        for other in members[1:]:
            total = total + other
        share = total.counts / total.counts.sum()
        loss = loss + 0.5 * 3 * (share * total.probability).sum() / total.tokens
        loss = loss + 0.1 * total.square_lse / total.tokens
    loss.backward()
    for key, gradient in gradients(model).items():
        assert torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), key


def test_router_loss_matters() -> None:
    """The reference of the tests above is not blind: without router losses the gradients differ clearly."""
    _, with_losses = _pass("none")
    _, without = _pass("none", balance_loss=None, z_loss_coefficient=0.0)
    key = next(k for k in without if "router" in k)
    assert (with_losses[key] - without[key]).norm() > 0.1 * with_losses[key].norm()


def test_reduction_mean_divides_by_the_number_of_groups() -> None:
    options = {"z_loss_coefficient": 0.0, "init_lora_weights": True}  # B = 0: only the balance loss moves the router
    for over, groups in (("module", 14), ("layer", 2)):
        _, total = _pass("none", balance_over=over, balance_reduction="sum", **options)
        _, mean = _pass("none", balance_over=over, balance_reduction="mean", **options)
        for key in (k for k in total if "router" in k):
            # Every layer passes the losses of the layers behind it on to its router, and B = 0 cuts that too.
            assert torch.allclose(mean[key] * groups, total[key], rtol=1e-4, atol=1e-8), key


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_counted_once(mode: str) -> None:
    model = _model(mode)
    context = context_of(model.get_base_model())
    context.record = True
    inputs = inputs_for("llama")
    for passes in (1, 2):
        model(**inputs).loss.backward()
        assert len(context.statistics) == 14
        for statistics in context.statistics.values():
            assert statistics.tokens.item() == passes * inputs["attention_mask"].sum().item()
            assert statistics.counts.sum().item() == 2 * statistics.tokens.item()
            assert not statistics.probability.requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_attaches_nothing(mode: str) -> None:
    model = _model(mode, init_lora_weights=True).eval()
    model(**inputs_for("llama")).loss.backward()
    assert all(not g.any() for k, g in gradients(model).items() if "router" in k)


@pytest.mark.parametrize("mode", MODES)
def test_two_passes_before_one_backward(mode: str) -> None:
    """Each pass keeps its own scale: 0.3 and 0.7 of their own losses."""
    model = _model(mode)
    inputs = inputs_for("llama")
    (0.3 * model(**inputs).loss + 0.7 * model(**inputs).loss).backward()
    found = gradients(model)
    _, wanted = _pass(mode)
    for key, gradient in wanted.items():
        assert torch.allclose(found[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())), key
