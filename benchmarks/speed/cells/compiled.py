"""`torch.compile` in one graph, and whether other token counts compile anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.cells.search import PAIRS, Sizes, TokenRows, search_of
from benchmarks.speed.models import LLAMA_LINEARS, Adaptation, llama, random_tokens

LENGTHS = (24, 17, 32, 9, 40)
"""Token counts per row. Not 1, which torch always treats apart."""
VARIANTS = ("frozen", "ours", "ours+balance")


class _Graphs:
    """A backend that runs graphs as they are and counts them: more than one is a graph break or a recompilation."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        self.made += 1
        backend: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")
        compiled: Callable[..., Any] = backend(graph, example)
        return compiled


def graphs_over(model: nn.Module, run: Callable[[int], object]) -> dict[str, Any]:
    """Compiles a model in place and runs it at every token count.

    Returns:
        ``graphs`` made after every run; or ``error``, why it is not one graph.
    """
    torch._dynamo.reset()
    backend = _Graphs()
    model.compile(fullgraph=True, dynamic=True, backend=backend)
    after: list[int] = []
    try:
        for length in LENGTHS:
            run(length)
            after.append(backend.made)
    except Exception as error:
        return {"graphs": after, "error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
    finally:
        torch._dynamo.reset()
    return {"graphs": after}


def measure_training(setting: Setting, variants: tuple[str, ...] = VARIANTS, layers: int = 2) -> Result:
    """Forward and backward of a small Llama."""
    torch.manual_seed(setting.seed)
    base = llama(64, layers, "fp32", heads=4).to(setting.device)
    found = {}
    for variant in variants:
        adapted = Adaptation(LLAMA_LINEARS, (8,) * 8, 2, "fp32").apply(variant, base)
        model = adapted.model

        def run(length: int, model: nn.Module = model) -> None:
            tokens = random_tokens(4, length, setting.seed, setting.device)
            embedded = base.get_input_embeddings()(tokens).requires_grad_()  # type: ignore[operator]
            model(inputs_embeds=embedded, labels=tokens, use_cache=False).loss.backward()

        found[variant] = graphs_over(model, run)
    return {"options": {"lengths": list(LENGTHS)}, "compiled": found}


def measure_search(setting: Setting) -> Result:
    """First-order pairs of the search with the model compiled."""
    found = {}
    for name in ("soft", "sampled"):
        search = search_of(PAIRS[name], Sizes(hidden=64, layers=2, length=8, dtype="fp32", experts=4, rank=4), setting)

        def run(length: int, name: str = name, search: Any = search) -> None:
            search.data = TokenRows.random(PAIRS[name].train, PAIRS[name].held_out, length, setting)
            search._one_step()

        found[name] = graphs_over(search.model, run)
    return {"options": {"lengths": list(LENGTHS)}, "compiled": found}


QUICK = Cell("compile/training", lambda setting: measure_training(setting, ("ours",), layers=1))
CELLS = [Cell("compile/training", measure_training), Cell("compile/search", measure_search)]
