"""The draws: what they depend on, how often each count comes, and what is on and off under them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from search_tools import mixture_search, small_config
from torch import Tensor

from guilomo import GuilomoError, ModuleShape
from guilomo.search import SelectionVectors, draws
from guilomo.search import relaxation as relax
from guilomo.search.draws import Rows, Shown, show

SHAPES = {"a": ModuleShape(4, 4), "b": ModuleShape(4, 8)}


def _vectors(**options: Any) -> SelectionVectors:
    vectors = SelectionVectors(SHAPES, small_config(**{"max_experts": 4, "max_rank": 5, "min_experts": 1, **options}))
    torch.manual_seed(8)
    with torch.no_grad():
        for g in vectors.parameters():
            g.normal_()
    return vectors


def _counts(shown: Shown, name: str, vectors: SelectionVectors) -> tuple[Tensor, Tensor]:
    """Drawn expert counts ``(B,)`` and ranks ``(B, E)``; every mask must be a first-n mask."""
    mask = shown.masks[name]
    ranks = mask.rank.detach().unflatten(1, vectors.ranks.shape[1:])
    kept = (mask.log_expert == 0) & (ranks[:, :1, 0] == 1)
    for on in (kept.float(), ranks):
        assert set(on.unique().tolist()) <= {0.0, 1.0}
        assert (on.diff(dim=-1) <= 0).all()
    return kept.sum(1), ranks.sum(2)


def _same(a: Shown, b: Shown) -> bool:
    return all(
        torch.equal(x, y)
        for name in SHAPES
        for x, y in zip(vars(a.masks[name]).values(), vars(b.masks[name]).values(), strict=True)
    )


def test_a_draw_depends_on_seed_step_kind_and_row_alone() -> None:
    vectors = _vectors()
    first = show(vectors, 3, [(Rows.TRAIN, 6)])
    torch.manual_seed(77)
    assert _same(first, show(vectors, 3, [(Rows.TRAIN, 6)], learn_from=1))
    others = [show(vectors, 4, [(Rows.TRAIN, 6)]), show(_vectors(seed=1), 3, [(Rows.TRAIN, 6)])]
    others += [show(vectors, 3, [(kind, 6)]) for kind in Rows if kind != Rows.TRAIN]
    assert not any(_same(first, other) for other in others)
    # Neither what else is in the batch nor how many rows follow matters.
    together = show(vectors, 3, [(Rows.HELD_OUT, 2), (Rows.TRAIN, 9)])
    assert torch.equal(together.masks["b"].rank[2:8], first.masks["b"].rank)
    assert torch.equal(together.log_chance[2:8], first.log_chance)


@pytest.mark.parametrize("rows", [6, 5])
def test_the_rows_of_two_processes_have_the_draws_of_one(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = _vectors()
    alone = show(vectors, 3, [(Rows.TRAIN, rows), (Rows.HELD_OUT, rows)]).masks["b"].rank
    monkeypatch.setattr(draws, "world", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr(draws, "rank", lambda process=process: process)
        mine = len(range(process, rows, 2))
        found = show(vectors, 3, [(Rows.TRAIN, mine), (Rows.HELD_OUT, mine)]).masks["b"].rank
        wanted = torch.cat([alone[:rows][process::2], alone[rows:][process::2]])
        assert torch.equal(found, wanted)


def _chances(g: list[float], least: int, temperature: float, experts: int) -> list[float]:
    """Probabilities of the counts 0..E, by hand."""
    weights = [math.exp(v / temperature) for v in g]
    pi = [w / sum(weights) for w in weights]
    if least == 0:
        return pi
    return [0.0] * least + [sum(pi[:least])] + pi[least:experts]


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("least", [0, 1, 2])
def test_counts_come_as_often_as_they_are_preferred(least: int, temperature: float) -> None:
    vectors = _vectors(min_experts=least)
    vectors.temperature = temperature
    rows = 20_000
    shown = show(vectors, 3, [(Rows.HELD_OUT, rows)])
    for m, name in enumerate(SHAPES):
        experts, ranks = _counts(shown, name, vectors)
        wanted = _chances(vectors.experts[m].tolist(), least, temperature, 4)
        found = torch.bincount(experts, minlength=5).tolist()
        assert found[:least] == [0] * least
        assert chisquare(found[least:], [p / sum(wanted) * rows for p in wanted[least:]]).pvalue > 1e-3
        for e in range(4):  # of the rows in which the module is on
            seen = ranks[experts > 0, e].long()
            wanted = [0.0, *_chances(vectors.ranks[m, e].tolist(), 0, temperature, 5)]
            found = torch.bincount(seen, minlength=6).tolist()
            assert found[0] == 0
            assert chisquare(found[1:], [p / sum(wanted) * len(seen) for p in wanted[1:]]).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("least", [0, 1, 2])
def test_the_chance_of_a_draw_is_that_of_its_expert_counts(least: int, temperature: float) -> None:
    """Of the modules that are on, given that they are."""
    vectors = _vectors(min_experts=least).double()
    vectors.temperature = temperature
    shown = show(vectors, 3, [(Rows.HELD_OUT, 50)])
    counts = [_counts(shown, name, vectors)[0].tolist() for name in SHAPES]
    assert {n for found in counts for n in found} == set(range(least, 5))
    by_hand = [_chances(vectors.experts[m].tolist(), least, temperature, 4) for m in range(2)]
    logs = [[0.0, *(math.log(p / (1 - of[0])) if p else -math.inf for p in of[1:])] for of in by_hand]
    wanted = [logs[0][a] + logs[1][b] for a, b in zip(*counts, strict=True)]
    assert shown.log_chance.tolist() == pytest.approx(wanted, rel=1e-12)


def test_what_cannot_be_drawn_is_not() -> None:
    """Preferences so strong that the other chances underflow to 0 decide alone, and nothing is divided by 0."""
    vectors = _vectors(min_experts=0)
    with torch.no_grad():
        for g in vectors.parameters():
            g.copy_(1e3 * (torch.arange(g.shape[-1]) == 2))
    shown = show(vectors, 0, [(Rows.HELD_OUT, 100)])
    for name in SHAPES:
        experts, ranks = _counts(shown, name, vectors)
        assert set(experts.tolist()) == {2}
        assert set(ranks.flatten().tolist()) == {3}
    shown.log_chance.sum().backward()
    assert vectors.experts.grad.isfinite().all()


def test_nothing_is_drawn_in_pairs_where_every_expert_stays() -> None:
    config = small_config(max_experts=2, top_k=2, warmup_steps=0)
    job = mixture_search(config, share=0.7)
    seen: list[int] = []
    job.model.get_base_model().layers[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    job.run(should_stop=lambda: True)
    assert not job.vectors.pairs
    assert seen[-1] == config.batch_size + config.held_out_batch_size
    shown = show(job.vectors, 0, [(Rows.HELD_OUT, 5)])
    assert shown.log_chance is None
    assert float(shown.score(torch.randn(5), torch.ones(5))) == 0
    assert all((mask.log_expert == 0).all() for mask in shown.masks.values())
    assert len({tuple(row) for row in next(iter(shown.masks.values())).rank.tolist()}) > 1  # ranks are drawn


def test_whether_a_single_expert_is_there_needs_no_pairs() -> None:
    """Nothing is behind a router then, and slopes tell."""
    vectors = _vectors(max_experts=1, top_k=1, min_experts=0)
    assert not vectors.pairs
    shown = show(vectors, 3, [(Rows.TRAIN, 40), (Rows.HELD_OUT, 40)], learn_from=1)
    assert shown.log_chance is None
    mask = shown.masks["b"].rank
    weights = torch.randn_like(mask)
    (found,) = torch.autograd.grad((weights * mask).sum(), vectors.experts)
    chance = vectors.experts.softmax(-1)[1, 1]
    # Taken whether the module is on or off, over the rank rows that it has or would have.
    drawn = show(_with_modules_on(vectors), 3, [(Rows.TRAIN, 40), (Rows.HELD_OUT, 40)]).masks["b"].rank.detach()
    assert not torch.equal(drawn, mask.detach())
    (slope,) = torch.autograd.grad(chance, vectors.experts)
    assert torch.allclose(found, (weights * drawn)[40:].sum() * slope, rtol=1e-4)


def _with_modules_on(vectors: SelectionVectors) -> SelectionVectors:
    """The same preferences over ranks, and all modules certain to be there."""
    other = copy.deepcopy(vectors)
    with torch.no_grad():
        other.experts[:, 1] += 1e3
    return other


def test_held_out_rows_are_seen_twice_where_experts_are_drawn() -> None:
    config = small_config(warmup_steps=0)
    job = mixture_search(config)
    seen: list[Tensor] = []
    job.model.get_base_model().layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    job.run(should_stop=lambda: True)
    n, held = config.batch_size, config.held_out_batch_size
    assert len(seen[-1]) == n + 2 * held
    assert torch.equal(seen[-1][n : n + held], seen[-1][n + held :])


def test_everything_is_on_until_the_first_outer_step() -> None:
    job = mixture_search(small_config(steps=6, warmup_steps=3, outer_every=2))
    seen: list[Any] = []
    layer = job.model.get_base_model().layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(job.problem.context.masks.get(module.name)))
    job.run(should_stop=lambda: job.step == 4)
    del seen[:2]  # the estimate
    assert seen[:3] == [None] * 3
    assert seen[3].rank.dim() == 2


def test_other_masks_are_not_drawn() -> None:
    for options in ({"masks": "soft"}, {"masks": "hard"}, {"relaxation": "prefix"}):
        vectors = _vectors(**options)
        shown = show(vectors, 3, [(Rows.TRAIN, 4)])
        assert shown.log_chance is None
        for name, mask in vectors.masks().items():
            assert torch.equal(shown.masks[name].rank, mask.rank)
            assert torch.equal(shown.masks[name].log_expert, mask.log_expert)
            assert shown.masks[name].rank.requires_grad
            assert not show(vectors, 3, [(Rows.TRAIN, 4)], learn_from=1).masks[name].rank.requires_grad


def test_a_module_that_is_off_has_a_count_too() -> None:
    """The slope there asks what the module would do with it, so it is drawn as for modules that are on."""
    vectors = _vectors(min_experts=0)
    mask = show(vectors, 3, [(Rows.TRAIN, 20_000)]).masks["a"]
    off = ~mask.rank.bool().any(1)
    kept = (mask.log_expert == 0).sum(1)
    assert set(mask.log_expert.unique().tolist()) == {0.0, relax.EXPERT_BLOCK}
    nothing, *chances = _chances(vectors.experts[0].tolist(), 0, 1.0, 4)
    assert abs(float(off.float().mean()) - nothing) < 0.02
    for rows in (off, ~off):
        found = torch.bincount(kept[rows], minlength=5).tolist()
        assert found[0] == 0
        assert chisquare(found[1:], [p / (1 - nothing) * int(rows.sum()) for p in chances]).pvalue > 1e-3


@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_a_fault_is_looked_for_under_the_draws_it_came_from(hypergradient: str) -> None:
    """A rank row of the last layer that is more often off than on, and whose outputs overflow once they are squared."""
    config = small_config(max_experts=1, top_k=1, max_rank=2, warmup_steps=0, hypergradient=hypergradient)
    job = mixture_search(config, share=0.74, target_modules=["head"])
    assert job.vectors.masks()["head"].rank.tolist() == [1, 0]
    with torch.no_grad():
        job.model.get_base_model().head.molora_B["default"][:, 1] = 1e30
    with pytest.raises(GuilomoError, match=r"at step 0 of the search, first in the loss, from finite outputs of every"):
        job.run()
