"""Hypergradients through gradient checkpointing, which repeats forward passes during the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from search_tools import Tokens, batches, bilevel, mixture, relative_error, small_config
from torch import Tensor
from transformers import PreTrainedModel

from guilomo import GuilomoError
from guilomo.search import Search, SearchConfig
from guilomo.search.hypergradient import Problem, authors_code, exact, first_order, unrolled
from tiny_models import build, inputs_for

CHECKPOINTING = next(
    n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(PreTrainedModel, n)
)
"""The name changed in transformers 5.23."""


def _config(masks: str) -> SearchConfig:
    return small_config(max_experts=3, max_rank=2, min_experts=1, masks=masks, learning_rate=2e-3)


def _model(config: SearchConfig, reentrant: bool | None) -> PeftModel:
    torch.manual_seed(0)
    model = mixture(build("llama").double(), config, target_modules=["q_proj", "v_proj"], balance_coefficient=0.5)
    if reentrant is not None:
        getattr(model, CHECKPOINTING)({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def _checkpointed(reentrant: bool | None, masks: str = "sampled") -> Problem:
    config = _config(masks)
    return bilevel(_model(config, reentrant), Tokens(inputs_for("llama", rows=6), train=3), config, warm_steps=0)


@pytest.mark.parametrize("masks", ["sampled", "soft"])
@pytest.mark.parametrize("function", [first_order, unrolled, authors_code])
def test_gradient_checkpointing_changes_nothing(function: Any, masks: str) -> None:
    plain, checkpointed = _checkpointed(None, masks), _checkpointed(False, masks)
    checkpointed.vectors.load_state_dict(plain.vectors.state_dict())
    wanted = function(plain, *batches(plain))
    assert relative_error(function(checkpointed, *batches(plain)), wanted) < 1e-10


def _split_gradients(reentrant: bool | None, masks: str) -> list[Tensor]:
    """Of one step of a search over a split batch."""
    config = _config(masks)
    model = _model(config, reentrant)
    search = Search(model, Tokens(inputs_for("llama", rows=7), train=4), config, 1200)
    model.double().train()
    search.vectors.double()
    search._outer_update = search._update_weights = lambda *norm: None
    search._split_step(list(search.data.train), list(search.data.held_out))
    return [p.grad for p in search.weights + search.problem.selection]


@pytest.mark.parametrize("masks", ["sampled", "soft"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_split_step_is_the_same_under_both_kinds(reentrant: bool, masks: str) -> None:
    wanted, found = (_split_gradients(kind, masks) for kind in (None, reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(g.any() for g in wanted)


@pytest.mark.parametrize("function", [first_order, unrolled, exact, authors_code])
def test_reentrant_checkpointing_is_refused(function: Any) -> None:
    problem = _checkpointed(reentrant=True)
    with pytest.raises(GuilomoError, match="use_reentrant=False"):
        function(problem, *batches(problem))
