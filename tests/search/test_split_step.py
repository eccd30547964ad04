"""One pass over a split batch moves weights and vectors exactly as two passes over its parts would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from search_tools import Tokens, mixture, relative_error, small_config
from torch import Tensor, nn

from guilomo import GuilomoError
from guilomo.search import Search
from guilomo.search.hypergradient import first_order
from guilomo.search.split_pass import other_trained_modules, split_batch
from tiny_models import build, inputs_for

TARGETS = {"llama": "all-linear", "bert": ["query", "output.dense", "pooler.dense"], "vit": ["q_proj", "fc1"]}


def _search(name: str, config: Any, **options: Any) -> Search:
    model = mixture(build(name).double(), config, target_modules=TARGETS[name], balance_coefficient=0.5, **options)
    search = Search(model, Tokens(inputs_for(name, rows=7), train=4), config, 3000)
    model.double().train()
    search.vectors.double()
    with torch.no_grad():
        for g in search.vectors.parameters():
            g.normal_()
    # The gradients are what the test looks at, so nothing may use them up.
    search._outer_update = search._update_weights = lambda *norm: None
    return search


def _clear(search: Search) -> None:
    for p in search.weights + search.problem.selection:
        p.grad = None


@pytest.mark.parametrize("outer_loss", ["log", "mean"])
@pytest.mark.parametrize(
    "masks", [{}, {"min_experts": 0}, {"masks": "soft"}, {"relaxation": "prefix"}], ids=lambda m: str(m or "sampled")
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"balance_over": "layer", "z_loss_coefficient": 0.1}),
        ("bert", {"modules_to_save": ["classifier"]}),
    ],
)
def test_equals_two_passes(name: str, options: dict[str, Any], masks: dict[str, Any], outer_loss: str) -> None:
    config = small_config(max_rank=2, outer_loss=outer_loss, **masks)
    search = _search(name, config, **options)
    search.step = search.problem.step = config.warmup_steps
    train_rows, held_rows = search.data.train, search.data.held_out
    train_loss, held_out_loss = search._split_step(list(train_rows), list(held_rows))
    weights = [w.grad for w in search.weights]
    selection = [g.grad for g in search.problem.selection]

    _clear(search)
    train, held_out = search._collate(list(train_rows)), search._collate(list(held_rows))
    assert train_loss == pytest.approx(search._inner_step(train), rel=1e-12)
    assert held_out_loss == pytest.approx(search._value(held_out), rel=1e-12)
    assert all(g.grad is None for g in search.problem.selection)
    wanted = [w.grad for w in search.weights]
    reached = [bool((g != 0).any()) for g in wanted]
    # Where modules may be off, a module may be on in none of the few rows, or have one expert in all of them.
    assert all(reached) or (config.min_experts == 0 and sum(reached) > len(reached) / 2)
    for found, reference in zip(weights, wanted, strict=True):
        assert torch.equal(found, reference) or relative_error([found], [reference]) < 1e-12
    reference = first_order(search.problem, train, held_out)
    assert all((g != 0).any() for g in reference)
    for found, wanted_too in zip(selection, reference, strict=True):
        assert relative_error([found], [wanted_too]) < 1e-12


def test_a_trained_head_is_among_the_weights_and_its_forward_is_put_back() -> None:
    search = _search("bert", small_config(max_rank=2), modules_to_save=["classifier"])
    trained = other_trained_modules(search.model)
    assert [type(m) for _, m in trained] == [nn.Linear]
    head = trained[0][1]
    with split_batch(search.model, search.problem.context, 2):
        assert "forward" in head.__dict__
    assert "forward" not in head.__dict__

    def hooked(x: Tensor) -> Tensor:
        return nn.Linear.forward(head, x)

    head.forward = hooked  # as accelerate places its hooks
    with split_batch(search.model, search.problem.context, 2):
        assert head.forward is not hooked
    assert head.forward is hooked
    assert search.problem.context.training_rows is None


def test_a_trained_module_of_two_inputs_is_refused() -> None:
    search = _search("bert", small_config(max_rank=2), modules_to_save=["classifier"])
    head = other_trained_modules(search.model)[0][1]
    with (
        split_batch(search.model, search.problem.context, 2),
        pytest.raises(GuilomoError, match=r"classifier.*hypergradient='unrolled'"),
    ):
        head(torch.zeros(4, 32), torch.zeros(4))
