"""Model shapes that several tests use."""

from __future__ import annotations

import pytest

from guilomo.allocation import ModuleShape


@pytest.fixture(scope="session")
def llama() -> dict[str, ModuleShape]:
    """LLaMA-2-7B: seven projections in each of 32 decoder layers."""
    square, up, down = (4096, 4096), (4096, 11008), (11008, 4096)
    layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
    layer |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    names = {f"model.layers.{index}.{name}": shape for index in range(32) for name, shape in layer.items()}
    return {name: ModuleShape(*shape) for name, shape in names.items()}


@pytest.fixture(scope="session")
def minilm() -> dict[str, ModuleShape]:
    """MiniLM: six linears in each of 6 encoder layers."""
    layer = {f"attention.self.{name}": (384, 384) for name in ("query", "key", "value")}
    layer |= {
        "attention.output.dense": (384, 384),
        "intermediate.dense": (384, 1536),
        "output.dense": (1536, 384),
    }
    names = {f"encoder.layer.{index}.{name}": shape for index in range(6) for name, shape in layer.items()}
    return {name: ModuleShape(*shape) for name, shape in names.items()}


@pytest.fixture(params=["minilm", "llama"])
def shapes(request: pytest.FixtureRequest) -> dict[str, ModuleShape]:
    """Each of the two models in turn."""
    found: dict[str, ModuleShape] = request.getfixturevalue(request.param)
    return found
