"""The Triton kernels equal the operations they replace: on a GPU, or in the interpreter (``make test-kernels``)."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from adapter_tools import attach, gradients
from guilomo.layers import ExpertLayout
from guilomo.layers.frozen_linear import Frozen
from guilomo.layers.fused import Member, shrink
from guilomo.layers.naive import naive_delta, naive_topk_weights
from guilomo.layers.paths import using
from guilomo.layers.routed import expand_routed, kernels_serve, route_in_kernel
from tiny_models import build, inputs_for

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter's products of bfloat16 are wrong in Triton 3.9, and float32 ones on GPUs are not what kernels are for.
DTYPES = [torch.bfloat16, torch.float16] if ON_GPU else [torch.float32, torch.float16]
CASES = {"mixed ranks": ((3, 8, 1, 5), 2), "many": ((2,) * 9, 4), "wide": ((24,) * 5, 3)}

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not (ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs triton, and a GPU or TRITON_INTERPRET=1: make test-kernels",
)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Relative to the norm, in the precision of the products."""
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    assert torch.linalg.norm(found.double() - wanted.double()) <= bound * torch.linalg.norm(wanted.double())


@pytest.mark.parametrize("adapter", ["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 67, 200])
def test_the_layer_equals_the_naive_loop(case: str, tokens: int, dtype: torch.dtype, adapter: str) -> None:
    if adapter == "float32" and dtype == torch.float32:
        pytest.skip("the same")
    ranks, top_k = CASES[case]
    inputs, outputs = 150, 45  # no multiple of anything that a program reads at once
    scales = tuple(7 / rank for rank in ranks)
    shapes = ((tokens, inputs), (outputs, inputs), (sum(ranks), inputs), (outputs, sum(ranks)), (len(ranks), inputs))
    x, w0, a, b, rows = (torch.randn(shape, device=DEVICE).to(dtype) / shape[-1] ** 0.5 for shape in shapes)
    bias = torch.randn(outputs, device=DEVICE).to(dtype)
    dy = torch.randn(tokens, outputs, device=DEVICE).to(dtype)
    if adapter == "float32":
        a, b, rows = (torch.randn_like(t, dtype=torch.float32) / t.shape[-1] ** 0.5 for t in (a, b, rows))
    leaves = [t.requires_grad_() for t in (x, a, b, rows)]
    spread = ExpertLayout(ranks, scales).to(DEVICE).spread
    frozen = Frozen(w0, bias)
    member = Member(a, rows, frozen)
    made = route_in_kernel(x, member, spread, top_k)
    _, [shrunk] = shrink(x, [member], made=[made.shrunk])
    y = expand_routed(x, frozen, shrunk, made, spread, b)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    weights = naive_topk_weights(exact[0] @ exact[3].T, top_k)
    reference = exact[0] @ w0.double().T + bias.double()
    reference = reference + naive_delta(exact[0], *exact[1:3], weights, ranks, scales)
    assert torch.equal(made.routing.chosen, weights > 0)
    close(y, reference, dtype)
    found, wanted = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(reference, exact, dy.double())
    for leaf, ours, theirs in zip(leaves, found, wanted, strict=True):
        assert ours.dtype == leaf.dtype
        close(ours, theirs, dtype)
    with torch.no_grad():
        assert torch.equal(expand_routed(x, frozen, shrunk, made, spread, b), y)


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.ones(3, 16, device=DEVICE, dtype=DTYPES[0])
    member = Member(
        torch.ones(4, 16, device=DEVICE, dtype=DTYPES[0]), torch.ones(4, 16, device=DEVICE, dtype=DTYPES[0])
    )
    spread = ExpertLayout((1, 1, 1, 1), (1.0,) * 4).to(DEVICE).spread
    made = route_in_kernel(x, member, spread, 2)
    assert made.routing.kept.tolist() == [[0, 1]] * 3
    assert made.routing.weights.tolist() == [[0.5, 0.5, 0, 0]] * 3


def model_and_inputs(**options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    model = attach(build("llama"), num_experts=3, top_k=2, **options).to(DEVICE)
    model = model.to(torch.bfloat16) if ON_GPU else model
    return model.train(), {name: t.to(DEVICE) for name, t in inputs_for("llama").items()}


@pytest.mark.parametrize("balance", ["switch", "sign", None])
def test_a_model_with_its_router_losses(balance: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values share one pass; a loss that reads routing weights takes another path."""
    model, inputs = model_and_inputs(balance_loss=balance, balance_coefficient=0.5, z_loss_coefficient=0.1)
    calls = []
    monkeypatch.setattr("guilomo.tuner.forward.route_in_kernel", lambda *a: calls.append(1) or route_in_kernel(*a))
    results = {}
    for path in ("joined", "kernels"):
        model.zero_grad()
        with using(path):
            loss = model(**inputs).loss
            loss.backward()
        results[path] = loss.detach(), gradients(model)
    assert len(calls) == (0 if balance == "sign" else 14)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    close(results["kernels"][0], results["joined"][0], dtype)
    if not ON_GPU:  # in half precision a single other choice of an expert shows in every gradient
        for name, gradient in results["joined"][1].items():
            assert torch.allclose(
                results["kernels"][1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-9
            ), name


def test_what_kernels_do_not_serve() -> None:
    x = torch.zeros(2, 8, device=DEVICE, dtype=DTYPES[0])
    assert kernels_serve(x, 64, 8, 2)
    assert not kernels_serve(x, 64, 8, 1)
    assert not kernels_serve(x, 64, 8, 8)
    assert not kernels_serve(x, 300, 8, 2)
    assert not kernels_serve(x, 65, 65, 2)


def test_second_derivatives_are_refused() -> None:
    model, inputs = model_and_inputs(balance_loss=None)
    trained = [p for p in model.parameters() if p.requires_grad]
    with using("kernels"):
        loss = model(**inputs).loss
    with pytest.raises(RuntimeError, match=r"using\('joined'\)"):
        torch.autograd.grad(loss, trained, create_graph=True)
