"""Small problems for the search's tests: residual networks with regression data, and bilevel problems in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from guilomo.search import Search, SearchConfig, SelectionVectors, search_sized
from guilomo.search.hypergradient import Problem
from guilomo.search.inner import make_optimizer
from guilomo.tuner import LoraMoeLayer, context_of

Row = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """``x + tanh(W x) / 2``, repeated, then a linear head."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.head = nn.Linear(width, width)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.5 * torch.tanh(layer(x))
        return self.head(x)


class Regression:
    """Rows ``(x, y)`` with squared error; the first half is for training."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        rows = list(zip(x, y, strict=True))
        self.train: Sequence[Row] = rows[: len(rows) // 2]
        self.held_out: Sequence[Row] = rows[len(rows) // 2 :]

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (logits - labels).square().mean(-1), torch.ones(len(logits), dtype=logits.dtype)


class Tokens:
    """Given batches of token models: rows are dicts of equal lengths; cross-entropy in the dtype of the logits."""

    def __init__(self, batch: dict[str, Tensor], train: int) -> None:
        rows = [{k: v[i] for k, v in batch.items()} for i in range(len(batch["labels"]))]
        self.train, self.held_out = rows[:train], rows[train:]

    def collate(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if logits.dim() == 2:
            return nn.functional.cross_entropy(logits, labels, reduction="none"), torch.ones(len(labels))
        targets = labels[:, 1:]
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
        return losses.sum(1), (targets != -100).sum(1)


def regression(width: int, rows: int = 32, dtype: torch.dtype = torch.float32) -> Regression:
    return Regression(torch.randn(rows, width, dtype=dtype), torch.randn(rows, width, dtype=dtype))


def small_config(**options: Any) -> SearchConfig:
    """A search of a few steps; `options` change it."""
    given = {
        "max_experts": 3,
        "max_rank": 3,
        "steps": 12,
        "warmup_steps": 2,
        "outer_every": 2,
        "batch_size": 4,
        "held_out_batch_size": 4,
        "check_every": 1,
        "record_every": 1,
        "patience": 0,
    }
    return SearchConfig(**{**given, **options})


def mixture(net: nn.Module, config: SearchConfig, **options: Any) -> PeftModel:
    """`net` with the mixture of a search on its layers; B is not zero, so that everything matters from the start."""
    given: dict[str, Any] = {"target_modules": r"layers\.\d+", "init_lora_weights": False, **options}
    model = get_peft_model(net, search_sized(config, **given))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, LoraMoeLayer):
                for b in layer.molora_B.values():
                    b.mul_(15 * (not given["init_lora_weights"]))  # 0.3 on average instead of 0.02
    return model


def mixture_search(config: SearchConfig, share: float = 0.4, folder: Any = None, **options: Any) -> Search:
    """A search on a residual network of 3 layers, at a share of what the mixture can spend."""
    torch.manual_seed(5)
    data, net = regression(width=8), Residual(depth=3, width=8)
    model = mixture(net, config, **options)
    size = sum(p.numel() for n, p in model.named_parameters() if ".molora_" in n)
    return Search(model, data, config, int(share * size), folder)


def bilevel(
    model: nn.Module, data: Any, config: SearchConfig, *, outer_loss: str = "log", warm_steps: int = 3
) -> Problem:
    """A problem in float64 at generic selection vectors, its optimiser some steps along."""
    model.double().train()
    shapes = next(iter(model.peft_config.values())).plan.shapes()
    vectors = SelectionVectors(shapes, config).double()
    with torch.no_grad():
        for g in vectors.parameters():
            g.normal_()
    weights = [p for p in model.parameters() if p.requires_grad]
    base = model.get_base_model()
    optimizer = make_optimizer(weights, config)
    found = Problem(model, context_of(base), vectors, optimizer, data, config.max_grad_norm, outer_loss)
    for _ in range(warm_steps):
        found.train_loss(data.collate(data.train)).backward()
        optimizer.step()
        optimizer.zero_grad()
        vectors.zero_grad()
    return found


def batches(problem: Problem) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All training rows, and all held-out rows."""
    data = problem.data
    return data.collate(data.train), data.collate(data.held_out)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of an optimiser's state, copied."""
    found = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for key, value in optimizer.state[parameter].items():
            found[f"{index}.{key}"] = torch.as_tensor(value).clone()
    return found


def bits_of(search: Search) -> dict[str, Tensor]:
    """Everything a search carries along."""
    found = {f"weight {i}": w.detach().clone() for i, w in enumerate(search.weights)}
    found |= {f"selection {i}": g.detach().clone() for i, g in enumerate(search.problem.selection)}
    found |= {f"inner {k}": v for k, v in state_of(search.optimizer).items()}
    found |= {f"outer {k}": v for k, v in state_of(search.outer_optimizer).items()}
    found |= {f"trajectory {k}": v for k, v in search.trajectory.tensors().items()}
    return {**found, "rng": torch.get_rng_state()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Of all tensors together, in the Euclidean norm."""
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (found, wanted))
    return float((a - b).norm() / b.norm())
