"""Hypergradients through gradient checkpointing, which repeats forward passes during the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from search_tools import Tokens, batches, bilevel, mixture, relative_error, small_config
from transformers import PreTrainedModel

from guilomo import GuilomoError
from guilomo.search.hypergradient import Problem, authors_code, exact, first_order, unrolled
from tiny_models import build, inputs_for

CHECKPOINTING = next(
    n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(PreTrainedModel, n)
)
"""The name changed in transformers 5.23."""


def _checkpointed(reentrant: bool | None) -> Problem:
    torch.manual_seed(0)
    config = small_config(max_experts=2, max_rank=2, masks="soft", learning_rate=2e-3)
    model = mixture(build("llama").double(), config, target_modules=["q_proj", "v_proj"], balance_coefficient=0.5)
    if reentrant is not None:
        getattr(model, CHECKPOINTING)({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return bilevel(model, Tokens(inputs_for("llama", rows=6), train=3), config, warm_steps=0)


@pytest.mark.parametrize("function", [first_order, unrolled, authors_code])
def test_gradient_checkpointing_changes_nothing(function: Any) -> None:
    plain, checkpointed = _checkpointed(None), _checkpointed(reentrant=False)
    checkpointed.vectors.load_state_dict(plain.vectors.state_dict())
    wanted = function(plain, *batches(plain))
    assert relative_error(function(checkpointed, *batches(plain)), wanted) < 1e-10


@pytest.mark.parametrize("function", [first_order, unrolled, exact, authors_code])
def test_reentrant_checkpointing_is_refused(function: Any) -> None:
    problem = _checkpointed(reentrant=True)
    with pytest.raises(GuilomoError, match="use_reentrant=False"):
        function(problem, *batches(problem))
