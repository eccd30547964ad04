"""What drawn counts teach: expert counts by an estimator that is right on average, ranks by slopes at both ends."""

from __future__ import annotations

import itertools

import pytest
import torch
from search_tools import Residual, batches, bilevel, mixture, regression, relative_error, small_config
from torch import Tensor, nn

from guilomo import ModuleShape
from guilomo.search import SelectionVectors, draws
from guilomo.search import relaxation as relax
from guilomo.search.draws import Rows, show
from guilomo.search.hypergradient import Problem, first_order
from guilomo.search.split_pass import masked
from guilomo.tuner import SelectionMasks

COPIES, STEPS = 500, 24


def _experts_only(least: int) -> Problem:
    """Two modules, up to three experts of rank 1: at most 16 combinations of counts, and no ranks to learn."""
    config = small_config(max_experts=3, max_rank=1, min_experts=least, top_k=max(least, 1))
    torch.manual_seed(2)
    model = mixture(Residual(depth=2, width=6).double(), config, router="dense")
    data = regression(width=6, rows=6, dtype=torch.float64)
    return bilevel(model, data, config, outer_loss="mean", warm_steps=0)


def _chances(vectors: SelectionVectors) -> tuple[Tensor, Tensor]:
    """``(M,)`` chance that a module is on, and ``(M, E)`` of the counts 1..E given that; differentiable."""
    pi = vectors.experts.softmax(-1)
    least = vectors.least_experts
    if least == 0:
        on = 1 - pi[:, 0]
        return on, pi[:, 1:] / on[:, None]
    return pi.new_ones(len(pi)), torch.cat(
        [pi.new_zeros(len(pi), least - 1), pi[:, :least].sum(1, keepdim=True), pi[:, least:]], 1
    )


def _exact_gradient(problem: Problem, batch: dict[str, Tensor]) -> Tensor:
    """Over all combinations of modules that are on and of counts: of the expected loss through the counts of modules
    that are on, and by its slopes through what is on."""
    vectors = problem.vectors
    least = vectors.least_experts
    on_chance, count_chance = _chances(vectors)
    expected = torch.zeros((), dtype=torch.float64)
    states = list(itertools.product((0, 1) if least == 0 else (1,), range(max(least, 1), 4)))
    for pair in itertools.product(states, repeat=2):
        stays = torch.tensor([float(on) for on, _ in pair], dtype=torch.float64, requires_grad=True)
        masks = {}
        for m, (name, (_, n)) in enumerate(zip(vectors.names, pair, strict=True)):
            offset = torch.where(torch.arange(3) < n, 0.0, relax.EXPERT_BLOCK)
            masks[name] = SelectionMasks(offset, stays[m] * torch.ones(3, dtype=torch.float64))
        with masked(problem.context, masks):
            loss = (problem.model(batch["x"]) - batch["labels"]).square().mean()
        slopes = torch.autograd.grad(loss, stays)[0]
        where = torch.stack([on_chance[m] if on else 1 - on_chance[m] for m, (on, _) in enumerate(pair)]).prod()
        counts = [count_chance[m, n - 1] for m, (_, n) in enumerate(pair)]
        taught = torch.stack([c if on else c.detach() for c, (on, _) in zip(counts, pair, strict=True)]).prod()
        expected = expected + where.detach() * taught * loss.detach()
        if least == 0:
            expected = expected + (where * taught).detach() * (on_chance * slopes).sum()
    (gradient,) = torch.autograd.grad(expected, vectors.experts)
    return gradient


@pytest.mark.parametrize("least", [0, 1, 2])
def test_expert_gradients_are_right_on_average(least: int) -> None:
    problem = _experts_only(least)
    _, held_out = batches(problem)
    wanted = _exact_gradient(problem, held_out)
    many = {k: v.repeat(COPIES, 1) for k, v in held_out.items()}
    found = []
    for problem.step in range(STEPS):
        found.append(first_order(problem, many, many)[0])
    estimates = torch.stack(found)
    error = estimates.std(0) / STEPS**0.5
    assert ((estimates.mean(0) - wanted).abs() <= 4 * error + 1e-12).all()
    assert (wanted.abs() > 8 * error).any()  # 0, twice or minus the gradient would be told from it


def test_the_logarithm_divides_by_the_loss() -> None:
    problem = _experts_only(1)
    train, held_out = batches(problem)
    mean = first_order(problem, train, held_out)
    with torch.no_grad():
        value = problem.held_out_loss(held_out)
    problem.outer_loss = "log"
    for a, b in zip(first_order(problem, train, held_out), mean, strict=True):
        assert torch.allclose(a, b / value, rtol=1e-12)
    assert mean[0].any()


def test_the_score_weighs_rows_by_their_labels() -> None:
    """Sums of losses over the labels of both draws, by hand."""
    problem = _experts_only(1)
    shown = show(problem.vectors, 0, [(Rows.TRAIN, 2), (Rows.HELD_OUT, 2), (Rows.HELD_OUT_AGAIN, 2)], learn_from=1)
    sums, counts = torch.tensor([3.0, 1.0, 2.0, 5.0]).double(), torch.tensor([4, 1, 4, 1])
    score = shown.score(sums, counts)
    assert float(score.detach()) == 0
    (found,) = torch.autograd.grad(score, problem.vectors.experts, retain_graph=True)
    s = [torch.autograd.grad(c, problem.vectors.experts, retain_graph=True)[0] for c in shown.log_chance]
    wanted = ((3 - 2) * (s[2] - s[4]) + (1 - 5) * (s[3] - s[5])) / 10
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-15)
    assert wanted.any()


class _OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def _ranks_only(rank: int, rows: int) -> Problem:
    """One linear with one expert; the loss is quadratic in its masks."""
    config = small_config(max_experts=1, top_k=1, max_rank=rank)
    model = mixture(_OneLinear().double(), config, lora_alpha=float(rank))
    x, y = torch.randn(2 * rows, 5, dtype=torch.float64), torch.randn(2 * rows, 4, dtype=torch.float64)
    data = regression(width=5)
    data.train, data.held_out = (list(zip(x[s], y[s], strict=True)) for s in (slice(0, rows), slice(rows, None)))
    return bilevel(model, data, config, outer_loss="mean", warm_steps=0)


def test_rank_gradients_are_the_slopes_at_the_draws() -> None:
    """``L = mean (W x + B (m * A x) - y)^2``, whose slopes at the drawn m are derived by hand."""
    problem = _ranks_only(rank=3, rows=40)
    train, held_out = batches(problem)
    problem.step = 6
    layer = problem.model.get_base_model().layers[0]
    a, b = layer.molora_A["default"].detach(), layer.molora_B["default"].detach()
    x, y = held_out["x"], held_out["labels"]
    m = show(problem.vectors, 6, [(Rows.HELD_OUT, 40)]).masks["layers.0"].rank.detach()
    assert len({tuple(row) for row in m.tolist()}) == 3
    residual = layer.base_layer(x).detach() + (m * (x @ a.T)) @ b.T - y
    slopes = (2 * (residual @ b) * (x @ a.T) / 4).mean(0)
    survival = relax.survival(problem.vectors.ranks, 1.0)
    (wanted,) = torch.autograd.grad((survival[0, 0] * slopes).sum(), problem.vectors.ranks)
    experts, ranks = first_order(problem, train, held_out)
    assert torch.allclose(ranks, wanted, rtol=1e-12)
    assert not experts.any()


def test_slopes_at_both_ends_average_to_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """At even chances, and for a loss that is quadratic between off and on."""
    problem = _ranks_only(rank=2, rows=1)
    with torch.no_grad():
        problem.vectors.ranks.zero_()
    _, held_out = batches(problem)
    both = {k: torch.cat([v, v]) for k, v in held_out.items()}
    levels = torch.tensor([0.25, 0.75])[:, None, None].expand(2, 1, 2)  # on in the first row, off in the second
    monkeypatch.setattr(draws, "_levels", lambda *_: levels)
    found = first_order(problem, both, both)[1]
    values = []
    for second in (0.0, 1.0):
        mask = torch.tensor([1.0, second], dtype=torch.float64)
        with torch.no_grad(), masked(problem.context, {"layers.0": SelectionMasks(None, mask)}):
            values.append(float((problem.model(held_out["x"]) - held_out["labels"]).square().mean()))
    chance = relax.survival(problem.vectors.ranks, 1.0)[0, 0, 1]
    assert float(chance.detach()) == 0.5
    (slope,) = torch.autograd.grad(chance, problem.vectors.ranks)
    assert torch.allclose(found, (values[1] - values[0]) * slope, rtol=1e-12)


@pytest.mark.parametrize("least", [0, 1])
def test_only_rows_that_teach_feed_rank_masks(least: int) -> None:
    config = small_config(max_experts=3, max_rank=4, min_experts=least)
    vectors = SelectionVectors({"a": ModuleShape(4, 4)}, config).double()
    shown = show(vectors, 0, [(Rows.TRAIN, 30), (Rows.HELD_OUT, 30)], learn_from=1)
    mask, offset = shown.masks["a"].rank, shown.masks["a"].log_expert
    weights = torch.randn_like(mask)
    (found,) = torch.autograd.grad((weights * mask).sum(), vectors.ranks, retain_graph=True)
    there = mask.detach()[30:, :1] == 1  # slopes of the ranks of modules that are off say nothing
    assert there.all() == (least == 1)
    taught = (weights[30:] * there).sum(0).view(1, 3, 4)
    (wanted,) = torch.autograd.grad((taught * relax.survival(vectors.ranks, 1.0)).sum(), vectors.ranks)
    assert relative_error([found], [wanted]) < 1e-12
    assert not offset.requires_grad
    constants = show(vectors, 0, [(Rows.TRAIN, 30)], learn_from=1).masks["a"]
    assert not constants.rank.requires_grad
    assert torch.equal(constants.rank, mask[:30])
