"""The search: a pair of weight step and selection step, beside a plain training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.clocks import Work
from benchmarks.speed.kernels import count
from benchmarks.speed.models import LLAMA_LINEARS, llama, random_tokens
from guilomo.search import Search, SearchConfig
from guilomo.search.data import mean_loss, row_losses
from guilomo.search.inner import make_optimizer
from guilomo.search.mixture import search_sized

LATE = 1
"""A step after the warm-up, at which nothing is recorded."""


@dataclass(frozen=True)
class TokenRows:
    """Random rows of tokens for a decoder; a `SearchData`."""

    train: list[Tensor]
    held_out: list[Tensor]

    @classmethod
    def random(cls, train: int, held_out: int, length: int, setting: Setting) -> TokenRows:
        rows = list(random_tokens(train + held_out, length, setting.seed, setting.device))
        return cls(rows[:train], rows[train:])

    def collate(self, rows: Any) -> dict[str, Tensor]:
        tokens = torch.stack(list(rows))
        return {"input_ids": tokens, "labels": tokens}

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
        return losses.sum(1), torch.full_like(losses[:, 0], losses.shape[1])


@dataclass(frozen=True)
class Pair:
    """One kind of search.

    Attributes:
        masks, hypergradient: as in `SearchConfig`.
        train, held_out: rows of the two batches.
        plain_rows: of the plain step it is compared with. For `first_order` as many as go through the model in the
            pair, where sampled masks show every held-out row twice; for `unrolled` the training rows alone.
        note: the same in words.
    """

    masks: str
    hypergradient: str
    train: int
    held_out: int
    plain_rows: int
    note: str

    def config(self, experts: int, rank: int) -> SearchConfig:
        options = {"masks": self.masks, "hypergradient": self.hypergradient}
        sizes = {"max_experts": experts, "max_rank": rank, "batch_size": self.train}
        when = {"steps": 1000, "warmup_steps": 0, "outer_every": 1, "record_every": 1000}
        return SearchConfig(**options, **sizes, **when, held_out_batch_size=self.held_out)


PAIRS = {
    "soft": Pair("soft", "first_order", 4, 4, 8, "4 training and 4 held-out rows; the plain step trains on 8 rows"),
    "sampled": Pair(
        "sampled",
        "first_order",
        4,
        2,
        8,
        "4 training rows and 2 held-out rows, each seen under two draws, so 8 rows in the model; the plain step "
        "trains on 8 rows",
    ),
    "unrolled": Pair(
        "soft",
        "unrolled",
        8,
        8,
        8,
        "8 training and 8 held-out rows; the plain step trains on the 8 training rows, so that passes are counted",
    ),
    "unrolled-sampled": Pair(
        "sampled",
        "unrolled",
        8,
        8,
        8,
        "as unrolled, with sampled masks: every row of every pass is seen under two draws",
    ),
}


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    length: int
    dtype: str
    experts: int = 8
    rank: int = 8


def search_of(pair: Pair, sizes: Sizes, setting: Setting) -> Search:
    """A search that stands behind its warm-up."""
    torch.manual_seed(setting.seed)
    base = llama(sizes.hidden, sizes.layers, sizes.dtype, heads=sizes.hidden // 64).to(setting.device)
    config = pair.config(sizes.experts, sizes.rank)
    mixture = search_sized(config, target_modules=LLAMA_LINEARS)
    model: nn.Module = get_peft_model(base, mixture, autocast_adapter_dtype=False)
    data = TokenRows.random(pair.train, pair.held_out, sizes.length, setting)
    budget = sum(p.numel() for p in model.parameters() if p.requires_grad) // 2
    search = Search(model.train(), data, config, budget)
    search.step = LATE
    return search


def plain_step_of(pair: Pair, sizes: Sizes, setting: Setting) -> Work:
    """Forward, backward, clipping and AdamW of the same mixture without masks."""
    search = search_of(pair, sizes, setting)
    data = TokenRows.random(pair.plain_rows, 0, sizes.length, setting)
    optimizer = make_optimizer(search.weights, search.config)
    model, weights, clip = search.model, search.weights, search.config.max_grad_norm or 1.0

    def run() -> None:
        mean_loss(*row_losses(model, data.collate(data.train), data)).backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def measure_search(pair: Pair, sizes: Sizes, setting: Setting) -> Result:
    search = search_of(pair, sizes, setting)
    works: dict[str, Work] = {"plain": plain_step_of(pair, sizes, setting), "pair": search._one_step}
    return {
        "options": {**vars(sizes), **vars(pair)},
        "counts": {name: {"step": count(work).to_dict()} for name, work in works.items()},
        "times": {"step": setting.time(works, "plain", setting.few)},
    }


def search_cell(name: str, sizes: Sizes, prefix: str = "") -> Cell:
    pair = PAIRS[name]
    return Cell(f"search/{prefix}{name}-{sizes.dtype}", lambda setting: measure_search(pair, sizes, setting))


QUICK = Sizes(hidden=128, layers=2, length=32, dtype="fp32")
CELLS = [
    search_cell(name, Sizes(hidden=512, layers=4, length=64, dtype=dtype))
    for dtype in ("fp32", "bf16")
    for name in PAIRS
]
