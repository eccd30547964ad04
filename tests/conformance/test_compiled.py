"""`torch.compile` gives what the plain model gives, router losses and their scale included."""

from __future__ import annotations

import pytest
import torch

from adapter_tools import attach, gradients, logits
from tiny_models import build, inputs_for, llama


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
def test_inference_in_one_graph() -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"), rank_pattern={"up_proj": [1, 3, 2], "o_proj": [4]})
    wanted = logits(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(compiled, inputs), wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer looks, nobody else
@pytest.mark.parametrize("balance_over", ["module", "layer"])
def test_training(balance_over: str) -> None:
    """The factor 0.25 is what four micro-batches would have: the router losses of a compiled step must follow it."""
    inputs = inputs_for("llama")
    options = {"balance_over": balance_over, "balance_coefficient": 0.5, "z_loss_coefficient": 0.1}
    model = attach(llama(num_hidden_layers=1), **options).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for factor in (1.0, 0.25):
        (factor * model(**inputs).loss).backward()
        wanted = gradients(model)
        model.zero_grad()
        (factor * compiled(**inputs).loss).backward()
        found = gradients(model)
        model.zero_grad()
        assert found.keys() == wanted.keys()
        for key, gradient in wanted.items():
            assert (found[key] - gradient).abs().max() <= 1e-6, (factor, key)
