"""Shared A, sequential branches and feed-forward blocks as one compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapter_tools import attach, gradients, logits
from tiny_models import build, inputs_for


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer looks, nobody else
@pytest.mark.parametrize(
    "options",
    [
        {"shared_a": True},
        {"num_experts": 1, "top_k": 1, "sequential_rank": 2},
        {"feed_forward_experts": True, "balance_loss": "switch_per_slot", "balance_coefficient": 0.5},
    ],
    ids=["shared A", "Hydra", "feed-forward experts"],
)
def test_training_in_one_graph(options: dict[str, Any]) -> None:
    inputs = inputs_for("llama")
    model = attach(build("llama"), **options)
    outputs = logits(model, inputs)
    model.train()
    model(**inputs).loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**inputs)
    found.loss.backward()
    assert torch.allclose(found.logits, outputs, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients(model).items():
        assert torch.allclose(gradient, wanted[key], rtol=1e-4, atol=1e-5 * float(wanted[key].abs().max())), key
