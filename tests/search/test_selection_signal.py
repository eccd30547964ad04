"""What a loss tells the selection vectors: grow, shrink, or, under the paper's rule, next to nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from search_tools import Regression, Residual, batches, bilevel, mixture, small_config
from torch import Tensor, nn

from guilomo import ModuleShape
from guilomo.search import SelectionVectors
from guilomo.search.hypergradient import Problem, first_order
from guilomo.search.split_pass import masked


class _OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def _teacher(problem: Problem, x: Tensor, experts: int, rank: int) -> Tensor:
    """Outputs of the problem's own mixture cut down to its first experts and first rank rows."""
    g = problem.vectors
    before = [p.detach().clone() for p in g.parameters()]
    with torch.no_grad():
        g.experts.copy_(40.0 * (torch.arange(g.experts.shape[-1]) == experts - 1))
        g.ranks.copy_(40.0 * (torch.arange(g.ranks.shape[-1]) == rank - 1))
        with masked(problem.context, g.masks()):
            y = problem.model(x)
        for p, value in zip(g.parameters(), before, strict=True):
            p.copy_(value)
    return y


@pytest.mark.parametrize("axis", ["experts", "ranks"])
@pytest.mark.parametrize("grows", [True, False])
def test_a_loss_grows_what_it_needs_and_shrinks_what_harms(grows: bool, axis: str) -> None:
    """The targets are made by the mixture with all or with one of its experts (or rank rows)."""
    config = small_config(max_experts=3, top_k=3, min_experts=1, max_rank=4, masks="soft", max_grad_norm=None)
    model = mixture(_OneLinear(), config, router="dense")
    x = torch.randn(64, 6, dtype=torch.float64)
    problem = bilevel(model, Regression(x, x), config, warm_steps=0, outer_loss="mean")
    with torch.no_grad():
        for g in problem.vectors.parameters():
            g.zero_()
    kept = {"experts": 3 if grows or axis == "ranks" else 1, "rank": 4 if grows or axis == "experts" else 1}
    problem.data = Regression(x, _teacher(problem, x, **kept))
    found = dict(zip(("experts", "ranks"), first_order(problem, *batches(problem)), strict=True))[axis]
    assert (found != 0).all()
    position = {"experts": 0, "ranks": 1}[axis]
    before = problem.vectors.expected()[position].detach()
    with torch.no_grad():
        getattr(problem.vectors, axis).sub_(0.1 * found / found.abs().max())
    after = problem.vectors.expected()[position].detach()
    assert ((after > before) if grows else (after < before)).all()


@pytest.mark.parametrize("options", [{}, {"min_experts": 0}, {"min_experts": 1, "temperature": 0.5}])
def test_masks_gradcheck(options: dict[str, Any]) -> None:
    config = small_config(max_experts=4, masks="soft", **options)
    vectors = SelectionVectors({"a": ModuleShape(4, 4), "b": ModuleShape(4, 8)}, config)
    values = [torch.randn(p.shape, dtype=torch.float64, requires_grad=True) for p in vectors.parameters()]
    del vectors.experts, vectors.ranks

    def masks(experts: Tensor, ranks: Tensor) -> list[Tensor]:
        vectors.experts, vectors.ranks = experts, ranks
        return [t for m in vectors.masks().values() for t in (m.log_expert, m.rank)]

    assert torch.autograd.gradcheck(lambda *v: tuple(masks(*v)), values)
    assert all((g != 0).any() for g in torch.autograd.grad(sum(t.sum() for t in masks(*values)), values))


def test_prefix_tells_the_expert_counts_next_to_nothing() -> None:
    """The gradients of the kept experts' logits cancel, and what the vectors get of them is small.

    With `survival`, on the same network and budget, it is of the size of the logits' gradients.
    """
    ratios = {}
    for relaxation in ("prefix", "survival"):
        config = small_config(max_experts=4, max_rank=3, min_experts=2, relaxation=relaxation, masks="soft")
        torch.manual_seed(2)
        x, y = torch.randn(2, 64, 6, dtype=torch.float64)
        model = mixture(Residual(depth=2, width=6), config)
        problem = bilevel(model, Regression(x, y), config, warm_steps=0)
        problem.vectors.start_at(int(0.7 * (2 * 4 * 3 * 12 + 2 * 4 * 6)))
        masks = problem.vectors.masks()
        logits = [m.log_expert for m in masks.values()]
        with masked(problem.context, masks):
            loss = problem.model(x).sub(y).square().mean()
        *at_logits, at_vectors = torch.autograd.grad(loss, [*logits, problem.vectors.experts])
        for gradient in at_logits:
            kept = gradient[gradient != 0]
            assert len(kept) >= 2
            assert kept.sum().abs() < 1e-12 * kept.abs().max()
        ratios[relaxation] = float(at_vectors.abs().max() / torch.stack(at_logits).abs().max())
    assert 0 < ratios["prefix"] < 0.02
    assert ratios["survival"] > 0.1
