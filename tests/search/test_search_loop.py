"""The search as a whole: what it returns, when it stops, what it refuses, and its estimate."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from search_tools import Regression, Residual, mixture, mixture_search, regression, small_config
from torch import Tensor

from guilomo import GuilomoError, LoraMoeConfig
from guilomo.search import Search, search, search_sized
from guilomo.search.estimate import _seconds, estimate
from guilomo.search.schedule import learning_rate_at


@pytest.mark.parametrize("share", [0.2, 0.45, 0.9, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"min_experts": 1},
        {"min_experts": 0},
        {"relaxation": "prefix"},
        {"max_experts": 1, "top_k": 1},
    ],
)
def test_any_vectors_give_a_plan_within_the_budget(options: dict[str, Any], share: float) -> None:
    config = small_config(**{"max_experts": 4, "max_rank": 12, **options})
    found = mixture_search(config, share)
    least = 1 if config.min_experts in (0, 1) else config.top_k
    for spread in (0.0, 1.0, 5.0):
        with torch.no_grad():
            for g in found.vectors.parameters():
                g.add_(spread * torch.randn_like(g))
        plan = found.allocation()
        used = plan.parameters(found.mixture.router_parameters)
        row = 16
        assert found.budget - max(0.01 * found.budget, row) <= used <= found.budget
        assert all(p.experts >= least for p in plan.adapted().values())
        assert all(p.experts <= config.max_experts and max(p.ranks) <= 12 for p in plan.adapted().values())
        assert config.min_experts == 0 or len(plan.adapted()) == 3


@pytest.mark.parametrize("router", ["dense", "fixed"])
def test_other_routers(router: str) -> None:
    config = small_config(max_rank=12, steps=4)
    found = mixture_search(config, router=router)
    expected = float(found.vectors.expected_parameters().detach())
    assert expected == pytest.approx(found.budget, rel=1e-3)
    result = found.run()
    used = result.allocation.parameters(found.mixture.router_parameters)
    assert 0.99 * found.budget <= used <= found.budget
    assert result.outer_steps == 1


@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled", "exact", "authors_code"])
def test_what_a_search_returns(hypergradient: str) -> None:
    config = small_config(steps=9, warmup_steps=3, outer_every=2, record_every=2, hypergradient=hypergradient)
    job = mixture_search(config)
    frozen = [p.detach().clone() for p in job.model.parameters() if not p.requires_grad]
    start = [w.detach().clone() for w in job.weights]
    told: list[tuple[int, int, str]] = []
    result = job.run(lambda *told_now: told.append(told_now))
    assert [t[:2] for t in told] == [(i, 9) for i in range(10)]
    assert told[0][2].startswith("about ")  # the estimate, before the first step
    assert told[1][2].startswith("loss ")
    assert "held out" in told[4][2]
    assert "held out" not in told[5][2]
    assert all(
        torch.equal(a, b)
        for a, b in zip(frozen, [p for p in job.model.parameters() if not p.requires_grad], strict=True)
    )
    assert all(not torch.equal(a, b) for a, b in zip(start, job.weights, strict=True))
    assert all(p.grad is None for p in job.weights + job.problem.selection)
    assert job.problem.context.masks == {}
    assert (result.steps, result.outer_steps, result.stopped_early, result.budget) == (9, 3, False, job.budget)
    assert result.allocation.strategy == f"guilomo (survival, {hypergradient})"
    found = json.loads(json.dumps(result.to_dict()))
    assert found["steps"] == 9
    assert found["outer_steps"] == 3
    track = found["trajectory"]
    assert track["step"] == [0, 2, 4, 6, 8]
    assert [v is None for v in track["held_out_loss"]] == [True, True, True, True, True]  # outer steps: 3, 5, 7
    assert all(v > 0 for v in track["train_loss"])
    assert list(track["experts"]) == list(track["ranks"]) == [f"layers.{i}" for i in range(3)]
    assert all(len(v) == 5 for v in [*track["experts"].values(), *track["ranks"].values()])
    assert track["expected_parameters"][0] == pytest.approx(job.budget, rel=1e-3)
    assert 0 < found["moved"]["ranks"]["mean"] <= found["moved"]["ranks"]["max"]
    assert 0 < found["moved"]["experts"]["mean"] <= found["moved"]["experts"]["max"]


def test_trajectories_follow_the_vectors() -> None:
    job = mixture_search(small_config(record_every=1, steps=6, warmup_steps=2, outer_every=1))
    result = job.run()
    track = result.trajectory
    assert track.step == list(range(6))
    assert [v is None for v in track.held_out_loss] == [True, True, False, False, False, False]
    assert torch.equal(track.ranks[0], track.ranks[1])
    assert not torch.equal(track.ranks[1], track.ranks[2])
    experts, ranks = job.vectors.expected()
    assert torch.equal(track.experts[-1], experts)
    assert torch.equal(track.ranks[-1], ranks)
    assert result.moved.ranks_mean == float((track.ranks[5] - track.ranks[0]).abs().mean())
    assert result.moved.ranks_max == float((track.ranks[5] - track.ranks[0]).abs().max())
    assert result.moved.experts_max == float((track.experts[5] - track.experts[0]).abs().max())
    shown = track.to_dict(["a", "b", "c"])["ranks"]["b"][-1]
    kept = (experts[1] - torch.arange(3)).clamp(0, 1).detach()
    assert shown == pytest.approx(float((kept * ranks[1].detach()).sum() / kept.sum()), abs=1e-4)


def test_the_warm_up_moves_no_vector_and_weights_do_not_hear_held_out_rows() -> None:
    job = mixture_search(small_config(steps=6, warmup_steps=5))
    start = [g.detach().clone() for g in job.problem.selection]
    held_out = job.data.held_out
    job.run(should_stop=lambda: job.step == 5)
    assert all(torch.equal(a, b) for a, b in zip(start, job.problem.selection, strict=True))
    job.run()
    assert not any(torch.equal(a, b) for a, b in zip(start, job.problem.selection, strict=True))
    other = mixture_search(small_config(steps=6, warmup_steps=5))
    other.data.held_out = [(x, 5 + y) for x, y in held_out]
    other.run()
    assert all(torch.equal(a, b) for a, b in zip(job.weights, other.weights, strict=True))
    assert not torch.equal(job.vectors.ranks, other.vectors.ranks)


def test_the_same_seed_gives_the_same_search() -> None:
    runs = []
    for seed in (0, 0, 1):
        job = mixture_search(small_config(seed=seed), lora_dropout=0.2)
        runs.append((job.run(), job.weights))
    assert runs[0][0].preference == runs[1][0].preference
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][0].preference != runs[2][0].preference


def test_learning_rate_schedule() -> None:
    config = small_config(steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate_at(t, config) for t in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.1)
    assert rates[100] == pytest.approx(0.2)
    assert learning_rate_at(0, small_config(warmup_steps=0, learning_rate=2.0)) == pytest.approx(2.0)


@pytest.mark.parametrize(("check_every", "patience", "steps"), [(1, 2, 5), (2, 1, 6), (1, 0, 30)])
def test_stops_when_the_allocation_is_stable(check_every: int, patience: int, steps: int) -> None:
    """Vectors that hardly move: `patience` + 1 equal looks after the two warm-up steps."""
    config = small_config(
        steps=30, outer_every=1, check_every=check_every, patience=patience, outer_learning_rate=1e-9, budget_weight=0
    )
    result = mixture_search(config).run()
    assert result.steps == steps
    assert result.stopped_early == (patience > 0)
    assert result.outer_steps == steps - 2


def test_does_not_stop_while_the_allocation_moves() -> None:
    config = small_config(steps=14, outer_every=1, patience=1, max_rank=12)
    job = mixture_search(config)

    @torch.no_grad()
    def stir(*_: object) -> None:
        for g in job.problem.selection:
            g.copy_(3 * torch.randn_like(g))

    result = job.run(stir)
    assert not result.stopped_early
    assert result.steps == 14


class _Broken(Regression):
    """Its loss is not a number from the given call on."""

    def __init__(self, good_calls: int) -> None:
        super().__init__(torch.randn(32, 8), torch.randn(32, 8))
        self.left = good_calls

    def row_loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.left -= 1
        sums, counts = super().row_loss(logits, labels)
        return (sums if self.left >= 0 else sums * float("nan")), counts


@pytest.mark.parametrize(("good", "step"), [(2 + 1, 1), (2 + 2, 2), (2 + 3, 3)])  # the estimate takes two calls
def test_a_loss_that_is_not_finite_names_step_and_remedy(good: int, step: int) -> None:
    config = small_config(learning_rate=0.25)
    job = Search(mixture(Residual(3, 8), config), _Broken(good), config, 300)
    with pytest.raises(GuilomoError, match=f"training loss became nan at step {step} ") as error:
        job.run()
    assert "search.learning_rate (now 0.25)" in str(error.value)
    assert all(torch.isfinite(w).all() for w in job.weights)


MOST = 3 * 3 * 3 * 16 + 3 * 3 * 8


@pytest.mark.parametrize(("min_experts", "least"), [(None, 144), (1, 48), (0, 16)])
def test_budgets_out_of_range_are_refused_before_the_search(min_experts: int | None, least: int) -> None:
    """The smallest plan has top_k experts (2 here), or 1, in every module, or one expert in one module."""
    config = small_config(min_experts=min_experts)
    for budget in (-5, 0, least - 1, MOST + 1):
        with pytest.raises(GuilomoError, match=f"budget = {budget} .* expected {least} to {MOST} trainable"):
            Search(mixture(Residual(3, 8), config), regression(8), config, budget)
    for budget in (least, MOST):
        plan = Search(mixture(Residual(3, 8), config), regression(8), config, budget).allocation()
        assert plan.parameters() == budget


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_missing_rows_are_refused(name: str) -> None:
    data = regression(8)
    setattr(data, name, [])
    config = small_config()
    with pytest.raises(GuilomoError, match=f"no {name} rows"):
        search(mixture(Residual(3, 8), config), data, config, 500)


def test_models_without_a_search_sized_mixture_are_refused() -> None:
    config = small_config()
    layers = r"layers\.\d"
    bare = Residual(3, 8)
    lora = get_peft_model(Residual(3, 8), LoraConfig(target_modules=layers))
    sizes = ({"num_experts": 2}, {"r": 4}, {"top_k": 1}, {"rank_pattern": {"1": [3, 3, 2]}})
    mixtures = [
        get_peft_model(
            Residual(3, 8), LoraMoeConfig(**{"num_experts": 3, "r": 3, "top_k": 2, "target_modules": layers, **size})
        )
        for size in sizes
    ]
    for model in (bare, lora, *mixtures):
        with pytest.raises(
            GuilomoError, match=r"mixture of 3 experts of rank 3 with top_k = 2 everywhere.*search_sized"
        ):
            Search(model, regression(8), config, 500)


def test_modules_left_out_of_the_mixture_stay_out() -> None:
    config = small_config(steps=4)
    model = mixture(Residual(3, 8), config, rank_pattern={"1": []})
    job = Search(model, regression(8), config, 200)
    assert job.vectors.names == ["layers.0", "layers.2"]
    plan = job.run().allocation
    assert set(plan.adapted()) == {"layers.0", "layers.2"}
    assert plan.parameters() <= 200


def test_search_sized_overrides_sizes_only() -> None:
    made = search_sized(small_config(), r=99, lora_alpha=3.0)
    assert (made.num_experts, made.r, made.top_k, made.lora_alpha) == (3, 3, 2, 3.0)


def test_the_estimate_leaves_no_trace() -> None:
    job = mixture_search(small_config(), lora_dropout=0.3)
    for p in job.weights:
        p.grad = torch.randn_like(p)
    before = [t.clone() for p in job.weights for t in (p.detach(), p.grad)], torch.get_rng_state()
    found = estimate(job.problem, job._batch(job.data.train, [0, 1, 2, 3]), job.config)
    assert set(found) == {"seconds", "seconds_per_step", "memory_gib"}
    assert all(torch.equal(a, b) for a, b in zip(before[0], [t for p in job.weights for t in (p, p.grad)], strict=True))
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(g.grad is None for g in job.problem.selection)
    assert job.problem.context.masks == {}


@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_the_estimate_is_of_the_right_order(hypergradient: str) -> None:
    config = small_config(
        steps=40, batch_size=64, held_out_batch_size=64, max_rank=8, hypergradient=hypergradient, record_every=20
    )
    torch.manual_seed(0)
    model = mixture(Residual(3, 256), config)
    result = search(model, regression(256, rows=512), config, 20_000)
    assert result.estimate["seconds_per_step"] > 0
    assert result.seconds / 5 < result.estimate["seconds"] < 5 * result.seconds
    weights = 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    at_least = (weights + 3 * trained + 64 * 256 * 4) / 2**30
    assert at_least - 1e-3 < result.estimate["memory_gib"] < 5 * at_least


@pytest.mark.parametrize("draws", [1, 2])
def test_the_estimate_counts_passes(draws: int) -> None:
    """10 weight steps and 4 outer steps, with twice as many held-out rows as training rows, each under some draws."""
    options = {"steps": 10, "warmup_steps": 2, "outer_every": 2, "batch_size": 4, "held_out_batch_size": 8}
    assert _seconds(1.0, small_config(**options), draws) == 10 + 4 * draws * 2
    assert _seconds(0.5, small_config(**options, hypergradient="unrolled"), draws) == 0.5 * (10 + 4 * (4 * draws - 1))
    assert _seconds(0.5, small_config(**options, hypergradient="exact"), draws) == 0.5 * (10 + 4 * draws * 4 * 1.5)
