"""The selection vectors: where they start, what they expect, and the masks they give the layers."""

from __future__ import annotations

import pytest
import torch
from search_tools import small_config

from guilomo import ModuleShape
from guilomo.search import SearchConfig, SelectionVectors
from guilomo.search import relaxation as relax

SHAPES = {"a": ModuleShape(16, 16), "b": ModuleShape(16, 48), "c": ModuleShape(48, 16)}
ROWS = sum(i + o for i, o in SHAPES.values())
INPUTS = sum(i for i, _ in SHAPES.values())


def _vectors(noise: float = 0.0, **options: object) -> SelectionVectors:
    vectors = SelectionVectors(SHAPES, small_config(**options))
    with torch.no_grad():
        for g in vectors.parameters():
            g.add_(noise * torch.randn_like(g))
    return vectors


def _most(config: SearchConfig) -> int:
    e, r = config.max_experts, config.max_rank
    return e * r * ROWS + (e * INPUTS if e > 1 else 0)


def _expected(vectors: SelectionVectors) -> float:
    return float(vectors.expected_parameters().detach())


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("least", [None, 0, 1])
@pytest.mark.parametrize(("experts", "rank"), [(1, 1), (1, 8), (2, 1), (4, 8), (8, 16), (3, 64), (40, 2)])
def test_start_meets_the_budget(experts: int, rank: int, least: int | None, share: float) -> None:
    """At any share of the way from the smallest plan to the largest."""
    top_k = 1 if experts == 1 else 2
    vectors = _vectors(max_experts=experts, max_rank=rank, top_k=top_k, min_experts=least)
    kept = vectors.least_experts
    lowest = kept * ROWS + (kept * INPUTS if experts > 1 else 0)
    budget = round(lowest + share * (_most(vectors.config) - lowest))
    if budget == 0:
        budget = 100
    vectors.start_at(budget)
    assert _expected(vectors) == pytest.approx(budget, rel=1e-3)
    for g in vectors.parameters():  # one common preference
        assert torch.equal(g, g.flatten(0, -2)[0].expand_as(g))


def test_start_meets_the_budget_at_other_temperatures() -> None:
    for temperature in (0.2, 5.0):
        vectors = _vectors(max_rank=32, temperature=temperature)
        for budget in (1500, _most(vectors.config) - 100):
            vectors.start_at(budget)
            assert _expected(vectors) == pytest.approx(budget, rel=1e-3)


def test_prefix_starts_at_the_counts_nearest_the_budget() -> None:
    vectors = _vectors(max_experts=8, max_rank=8, relaxation="prefix")
    vectors.start_at(5 * 5 * ROWS + 5 * INPUTS)
    experts, ranks = vectors.expected()
    assert torch.equal(experts, torch.full((3,), 5.0))
    assert torch.equal(ranks, torch.full((3, 8), 5.0))
    # The discretised bell that the released code starts from.
    place = torch.arange(8, dtype=torch.float32)
    bell = torch.exp(-0.5 * ((place - 4) / (8 / 6)) ** 2).softmax(-1)
    assert torch.allclose(vectors.experts[1], bell)
    assert torch.allclose(vectors.ranks[2, 7], bell)


def test_expected_parameters_count_experts_ranks_and_routers() -> None:
    vectors = _vectors()
    with torch.no_grad():
        vectors.experts.copy_(torch.tensor([-80.0, 80.0, -80.0]).expand_as(vectors.experts))
        vectors.ranks.copy_(torch.tensor([-80.0, -80.0, 80.0]).expand_as(vectors.ranks))
    assert _expected(vectors) == 2 * 3 * ROWS + 2 * INPUTS


def test_routers_cost_what_their_kind_costs() -> None:
    free = SelectionVectors(SHAPES, small_config(), lambda experts, inputs: 0)
    assert _expected(_vectors()) - _expected(free) == pytest.approx((2 + 1 / 3) * INPUTS)


def test_the_first_top_k_experts_carry_no_doubt() -> None:
    vectors = _vectors(noise=2, max_experts=5, top_k=3)
    experts, ranks = vectors.survival_masks()
    assert torch.equal(experts[:, :3], torch.ones(3, 3))
    assert (experts[:, 3:] < 1).all()
    assert (ranks[..., 1:] < 1).all()
    assert (vectors.expected()[0] >= 3).all()
    assert _vectors(max_experts=5, top_k=3, min_experts=1).survival_masks()[0][0, 1] < 1


@pytest.mark.parametrize("relaxation", ["survival", "prefix"])
def test_shapes_names_and_bounds(relaxation: str) -> None:
    vectors = _vectors(noise=1, max_experts=4, max_rank=5, relaxation=relaxation)
    experts, ranks = vectors.expected()
    assert (experts.shape, ranks.shape) == ((3,), (3, 4))
    experts, ranks = experts.detach(), ranks.detach()
    wish = vectors.preference(2000)
    assert list(wish.experts) == list(wish.ranks) == list(SHAPES)
    assert all(2 <= e <= 4 for e in wish.experts.values())
    assert all(len(r) == 4 and min(r) >= 1 and max(r) <= 5 for r in wish.ranks.values())
    assert wish.experts["b"] == pytest.approx(float(experts[1]))
    assert wish.ranks["c"] == pytest.approx(tuple(ranks[2].tolist()))
    masks = vectors.masks()
    assert list(masks) == list(SHAPES)
    for mask in masks.values():
        assert mask.log_expert.shape == (4,)
        assert mask.rank.shape == (20,)
        assert mask.rank.requires_grad
    constants = vectors.masks(detach=True)
    assert not any(t.requires_grad for m in constants.values() for t in (m.log_expert, m.rank))
    assert torch.equal(constants["b"].rank, masks["b"].rank)


def test_rank_masks_lie_expert_after_expert() -> None:
    vectors = _vectors(noise=1, masks="soft")
    assert torch.equal(vectors.masks()["b"].rank, relax.survival(vectors.ranks[1], 1.0).reshape(-1))


def test_one_expert_has_no_expert_mask() -> None:
    assert all(m.log_expert is None for m in _vectors(max_experts=1, top_k=1).masks().values())


def test_a_module_that_may_go_fades_through_its_rows() -> None:
    vectors = _vectors(noise=1, max_experts=2, min_experts=0, masks="soft")
    assert vectors.experts.shape == (3, 3)  # counts 0, 1, 2
    exists = relax.survival(vectors.experts, 1.0)[:, 1]
    ranks = relax.survival(vectors.ranks, 1.0)
    for m, mask in enumerate(vectors.masks().values()):
        assert torch.equal(mask.rank, (exists[m] * ranks[m]).reshape(-1))
        assert mask.log_expert.shape == (2,)
    (gradient,) = torch.autograd.grad(vectors.masks()["a"].rank.sum(), vectors.experts)
    assert gradient[0, 0] < 0 < gradient[0, 1]


@pytest.mark.parametrize("masks", ["sampled", "hard"])
@pytest.mark.parametrize("least", [None, 0])
def test_what_is_likelier_than_not_is_on(least: int | None, masks: str) -> None:
    """With gradients as of the soft masks. A module that is off blocks no expert."""
    vectors = _vectors(noise=2, masks=masks, min_experts=least, max_experts=4, top_k=1)
    experts, ranks = (t.detach() >= 0.5 for t in vectors.survival_masks())
    assert experts[:, 0].all() == (least is None)
    assert experts[:, 0].any()
    for m, mask in enumerate(vectors.masks().values()):
        assert mask.rank.tolist() == (ranks[m] & experts[m, 0]).flatten().tolist()
        on = experts[m] | ~experts[m, 0]
        assert mask.log_expert.tolist() == [0.0 if kept else relax.EXPERT_BLOCK for kept in on]
    soft = _vectors(max_experts=4, top_k=1, min_experts=least, masks="soft")
    soft.load_state_dict(vectors.state_dict())
    weights = torch.randn(4)
    found, wanted = (
        torch.autograd.grad((v.masks()["a"].log_expert * weights).sum(), v.experts)[0] for v in (vectors, soft)
    )
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("budget", "sign"), [(600, -1), (4000, 1)])
def test_the_budget_pulls_towards_itself(budget: int, sign: int) -> None:
    """A gradient step changes the expected parameters towards the budget, from above and from below."""
    vectors = _vectors(noise=0.5, max_experts=4, max_rank=8)
    before = _expected(vectors)
    vectors.budget_penalty(budget).backward()
    assert all((g.grad != 0).any() for g in vectors.parameters())
    with torch.no_grad():
        for g in vectors.parameters():
            g -= 0.01 * g.grad
    assert sign * (_expected(vectors) - before) > 0
    exact = _vectors()
    assert float(exact.budget_penalty(round(_expected(exact))).detach()) < 1e-6


def _with_chances(chances: list[float]) -> SelectionVectors:
    vectors = _vectors(max_experts=1, top_k=1, min_experts=0, max_rank=8)
    with torch.no_grad():
        vectors.experts.copy_(torch.tensor([[1 - p, p] for p in chances]).log())
    return vectors


def test_likely_modules_stay_and_unlikely_ones_go() -> None:
    wish = _with_chances([0.9, 0.1, 0.6]).preference(300)
    assert wish.experts == pytest.approx({"a": 1, "b": 0, "c": 1})


def test_something_stays_where_every_chance_is_small() -> None:
    """At the start of a tight search no module reaches one half; the likeliest ones spend the budget."""
    vectors = _with_chances([0.2, 0.3, 0.1])
    cost = [4.5 * s for s in (32, 64, 64)]  # at the wished rank
    assert vectors.preference(round(cost[1]) - 1).experts == pytest.approx({"a": 0, "b": 1, "c": 0})
    assert vectors.preference(round(cost[1]) + 1).experts == pytest.approx({"a": 1, "b": 1, "c": 0})
    assert vectors.preference(1000).experts == pytest.approx({"a": 1, "b": 1, "c": 1})


def test_nothing_stays_that_the_budget_cannot_pay() -> None:
    vectors = _with_chances([0.8, 0.9, 0.7])
    assert vectors.preference(100).experts == pytest.approx({"a": 1, "b": 1, "c": 0})
    assert vectors.preference(63).experts == pytest.approx({"a": 1, "b": 0, "c": 0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_experts": 1, "top_k": 2}, "Raise max_experts or lower top_k"),
        ({"warmup_steps": 12}, "Lower warmup_steps"),
        ({"relaxation": "prefix", "min_experts": 0}, "needs relaxation = 'survival'"),
        ({"min_experts": 4}, "above max_experts = 3"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**options)
