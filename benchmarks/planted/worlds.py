"""Networks with a planted change, the data that the changed network makes, and what there is to find."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

NOISE = 0.1
"""Standard deviation of the noise on the targets, as a share of what the planted change does to them."""


@dataclass
class Pairs:
    """Inputs and noisy outputs of the changed network; squared error per row. A `guilomo.search.SearchData`."""

    inputs: str
    train: Sequence[tuple[Tensor, Tensor]]
    held_out: Sequence[tuple[Tensor, Tensor]]
    test: Sequence[tuple[Tensor, Tensor]]

    def collate(self, rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        return {self.inputs: torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    def row_loss(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs - labels).square().flatten(1).mean(1), torch.ones(len(labels))


@dataclass
class World:
    """One planted problem.

    Attributes:
        base: the network to be adapted. targets: regex of its adapted modules.
        planted: what each module needs: ranks, or expert counts.
        axis: ``ranks`` or ``experts``, what the search is free to choose.
        data: made by the changed network; effect: mean square of the change in its outputs, the unit of losses.
        search: options of the search that belong to this world. train_steps: of a fresh training of a found plan.
    """

    base: nn.Module
    targets: str
    planted: dict[str, int]
    axis: str
    data: Pairs
    effect: float
    search: dict[str, Any]
    train_steps: int


class Residual(nn.Module):
    """``x + tanh(W x + change) / 2``, repeated, then a linear head."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.head = nn.Linear(width, width)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.8 * width**-0.5)

    def forward(self, x: Tensor, changes: Sequence[Tensor] | None = None) -> Tensor:
        """``changes``: one ``(B, O, I)`` per layer, a change of its weight for every row."""
        for i, layer in enumerate(self.layers):
            z = layer(x)
            if changes is not None:
                z = z + (changes[i] @ x[:, :, None]).squeeze(-1)
            x = x + 0.5 * torch.tanh(z)
        return self.head(x)


def residual_ranks(
    seed: int, ranks: Sequence[int] = (0, 1, 2, 3, 4, 5, 6, 8), width: int = 64, rows: int = 1024
) -> World:
    """A residual network, each layer changed by a matrix of one of the ranks; all directions weigh the same."""
    torch.manual_seed(seed)
    planted = _shuffled(ranks)
    base = Residual(len(planted), width)
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for layer, rank in zip(changed.layers, planted, strict=True):
            layer.weight += _low_rank(width, width, rank)
    x = torch.randn(4 * rows, width)
    data, effect = _data("x", x, base, changed, rows)
    names = {f"layers.{i}": rank for i, rank in enumerate(planted)}
    options = {"max_rank": max(ranks), "min_experts": 0, "steps": 600, "warmup_steps": 100, **_batches(64)}
    return World(base, r"layers\.\d+", names, "ranks", data, effect, options, train_steps=600)


def transformer_ranks(seed: int) -> World:
    """A Llama of 2 layers whose 14 linears are changed by matrices of rank 0 to 6; each direction weighs the same."""
    torch.manual_seed(seed)
    rows, length, vocabulary = 768, 12, 48
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config)
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    planted = dict(zip(names, _shuffled([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]), strict=True))
    ids = torch.randint(vocabulary, (4 * rows, length))
    changed = copy.deepcopy(base)
    with torch.no_grad():
        for name, rank in planted.items():
            _plant_evenly(changed.get_submodule(name), rank, base, changed, ids[:128])
    data, effect = _data("input_ids", ids, base, changed, rows)
    options = {"max_rank": 6, "min_experts": 0, "steps": 1000, "warmup_steps": 200, **_batches(32)}
    return World(base, r".*_proj", planted, "ranks", data, effect, options, train_steps=400)


def residual_experts(seed: int) -> World:
    """Rows of 8 kinds; every layer sorts the kinds into groups, 1 to 8 of them, and changes each group its own way.

    The kind of a row shows in a part of the input that no change reads. Changes have rank 2 and, summed over the rows,
    each group's weighs the same.
    """
    torch.manual_seed(seed)
    width, kinds, rank, rows = 48, 8, 2, 4096
    planted = _shuffled([1, 2, 3, 4, 6, 8])
    base = Residual(len(planted), width)
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    kind = torch.randint(kinds, (2 * rows + 1024,))
    x = 4 * basis[:kinds][kind] + torch.randn(len(kind), width)
    changes = [_grouped(groups, kinds, rank, basis[kinds:])[kind] for groups in planted]
    with torch.no_grad():
        change = base(x, changes) - base(x)
        effect = float(change.square().mean())
        y = base(x) + change + NOISE * effect**0.5 * torch.randn_like(change)
    pairs = list(zip(x, y, strict=True))
    data = Pairs("x", pairs[:rows], pairs[rows : 2 * rows], pairs[2 * rows :])
    names = {f"layers.{i}": groups for i, groups in enumerate(planted)}
    options = {"max_experts": 8, "max_rank": rank, "min_experts": 1, "steps": 2000, "warmup_steps": 700, **_batches(64)}
    return World(base, r"layers\.\d+", names, "experts", data, effect, options, train_steps=1000)


WORLDS: dict[str, Callable[[int], World]] = {
    "residual-ranks": residual_ranks,
    "transformer-ranks": transformer_ranks,
    "residual-experts": residual_experts,
}


def _batches(rows: int) -> dict[str, int]:
    return {"batch_size": rows, "held_out_batch_size": rows}


def _shuffled(values: Sequence[int]) -> list[int]:
    return [values[i] for i in torch.randperm(len(values)).tolist()]


def _low_rank(out: int, inside: int, rank: int) -> Tensor:
    """``(O, I)`` of the given rank, all of whose singular values are 1."""
    u, v = (torch.linalg.qr(torch.randn(n, max(rank, 1)))[0][:, :rank] for n in (out, inside))
    return u @ v.T


def _grouped(groups: int, kinds: int, rank: int, readable: Tensor) -> Tensor:
    """``(kinds, O, I)`` changes, equal within a group; they read only the rows of `readable`."""
    width = readable.shape[1]
    u = torch.linalg.qr(torch.randn(width, groups * rank))[0]
    v = readable.T @ torch.linalg.qr(torch.randn(len(readable), groups * rank))[0]
    each = torch.stack([u[:, g * rank : (g + 1) * rank] @ v[:, g * rank : (g + 1) * rank].T for g in range(groups)])
    return groups**0.5 * each[torch.randperm(kinds) % groups]


def _plant_evenly(layer: Any, rank: int, base: nn.Module, changed: nn.Module, ids: Tensor) -> None:
    """Changes one linear so that, by itself, each direction moves the outputs by the same mean square."""
    if rank == 0:
        return
    delta = _low_rank(*layer.weight.shape, rank)
    alone = copy.deepcopy(base)
    name = next(n for n, m in changed.named_modules() if m is layer)
    weight = alone.get_submodule(name).weight
    size, start = 1.0, weight.clone()
    for _ in range(4):  # the effect is nearly quadratic in the size
        weight.copy_(start + size * delta)
        effect = float((alone(ids).logits - base(ids).logits).square().mean())
        size *= (0.02 * rank / effect) ** 0.5
    layer.weight += size * delta


def _data(inputs: str, x: Tensor, base: nn.Module, changed: nn.Module, rows: int) -> tuple[Pairs, float]:
    """Noisy outputs of the changed network: `rows` rows to train on, as many held out, the others for the test."""
    with torch.no_grad():
        y, before = (getattr(out, "logits", out) for out in (changed(x), base(x)))
        effect = float((y - before).square().mean())
        y = y + NOISE * effect**0.5 * torch.randn_like(y)
    pairs = list(zip(x, y, strict=True))
    return Pairs(inputs, pairs[:rows], pairs[rows : 2 * rows], pairs[2 * rows :]), effect
