"""A whole search beside the training that follows it, both by default, extrapolated from their steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.speed.cells.cell import Absent, Cell, Result, Setting
from benchmarks.speed.cells.search import TokenRows
from benchmarks.speed.clocks import Work
from benchmarks.speed.models import LLAMA_LINEARS
from guilomo.search import Search, SearchConfig
from guilomo.search.data import mean_loss, row_losses
from guilomo.search.inner import make_optimizer
from guilomo.search.mixture import search_sized
from guilomo.search.schedule import is_outer
from guilomo.training import TrainConfig
from guilomo.tuner import LoraMoeConfig

LENGTH = 128
ROWS = 10_000
"""Training rows of the second stage. The search does not depend on them, the second stage is proportional to them."""


def measure_whole(setting: Setting) -> Result:
    """The steps of both stages, timed in the same rounds, and how many of each the default configs make."""
    search, train = SearchConfig(), TrainConfig()
    kinds = [_kind(step, search) for step in range(search.steps)]
    works: dict[str, Work] = {kind: _search_step(kinds.index(kind), setting) for kind in dict.fromkeys(kinds)}
    works["train"] = _training_step(setting)
    timing = setting.time(works, "train", setting.few)
    in_steps = sum(timing["ratios"][kind]["median"] * kinds.count(kind) for kind in dict.fromkeys(kinds))
    steps = train.epochs * ROWS / train.batch_size
    return {
        "options": {"model": "stories260K", "length": LENGTH, "rows": ROWS, "train": train.model_dump()},
        "whole": {
            "search_steps": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "search_in_training_steps": round(in_steps, 1),
            "training_steps": steps,
            "ratio": round(in_steps / steps, 4),
            "rows_for_a_quarter": round(4 * in_steps * train.batch_size / train.epochs),
        },
        "times": {"step": timing},
    }


def _kind(step: int, config: SearchConfig) -> str:
    if step < config.warmup_steps:
        return "warm-up"
    return "pair" if is_outer(step, config) else "masked"


def _model(config: LoraMoeConfig, setting: Setting) -> nn.Module:
    data = os.environ.get("GUILOMO_DATA")
    if not data:
        raise Absent("GUILOMO_DATA is not set: expected the folder that holds models/stories260K.")
    torch.manual_seed(setting.seed)
    base = AutoModelForCausalLM.from_pretrained(Path(data) / "models" / "stories260K").to(setting.device)
    model: Any = get_peft_model(base, config)
    return model.train()  # type: ignore[no-any-return]


def _rows(count: int, setting: Setting) -> TokenRows:
    # The vocabulary of the model has 512 entries.
    rows = TokenRows.random(count, count, LENGTH, setting)
    return TokenRows([row % 512 for row in rows.train], [row % 512 for row in rows.held_out])


def _search_step(step: int, setting: Setting) -> Work:
    config = SearchConfig()
    model = _model(search_sized(config, target_modules=LLAMA_LINEARS), setting)
    budget = sum(p.numel() for p in model.parameters() if p.requires_grad) // 2
    search = Search(model, _rows(config.batch_size, setting), config, budget)
    search.step = step
    return search._one_step


def _training_step(setting: Setting) -> Work:
    """A mixture of half the rank, which is about half of what the search starts from."""
    config, train = SearchConfig(), TrainConfig()
    sizes = {"num_experts": config.max_experts, "r": config.max_rank // 2, "top_k": config.top_k}
    model = _model(LoraMoeConfig(target_modules=LLAMA_LINEARS, **sizes), setting)  # type: ignore[arg-type]
    data = _rows(train.batch_size, setting)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(weights, config)

    def run() -> None:
        mean_loss(*row_losses(model, data.collate(data.train), data)).backward()
        torch.nn.utils.clip_grad_norm_(weights, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


CELLS = [Cell("whole/stories260K", measure_whole)]
