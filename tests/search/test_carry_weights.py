"""The second stage started from the search computes what the search computed, where the plan keeps what counts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from search_tools import Residual, mixture, mixture_search, regression, small_config
from torch import Tensor, nn

from guilomo import Allocation, LoraMoeConfig, ModulePlan
from guilomo.search import Search, carry_weights
from guilomo.search.split_pass import masked


def _generic(search: Search, spread: float = 3.0) -> Search:
    """At random vectors, with every trained weight away from its start."""
    with torch.no_grad():
        for p in [*search.weights, *search.problem.selection]:
            p.add_(spread * torch.randn_like(p) if p in set(search.problem.selection) else 0.3 * torch.randn_like(p))
    search.model.eval()
    return search


def _searched_outputs(search: Search, x: Tensor) -> Tensor:
    with torch.no_grad(), masked(search.problem.context, search.vectors.masks()):
        return search.model(x)


def _unmasked_part(search: Search) -> Allocation:
    """The plan that keeps exactly the experts and rows whose hard masks are 1."""
    plans = {}
    for name, shape in search.mixture.shapes.items():
        mask = search.vectors.masks(detach=True)[name]
        rows = mask.rank.view(search.config.max_experts, -1).sum(1).int().tolist()
        kept = len(rows) if mask.log_expert is None else int((mask.log_expert == 0).sum())
        ranks = tuple(rows[:kept]) if rows[0] else ()
        plans[name] = ModulePlan(*shape, ranks, min(search.config.top_k, kept) if ranks else 2)
    return Allocation(plans, scaling=search.mixture.plan.scaling, alpha=search.mixture.plan.alpha)


def _fresh(plan: Allocation, base: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(99)
    return get_peft_model(base, LoraMoeConfig(allocation=plan, init_lora_weights=False, **options)).eval()


def _base_of(search: Search) -> nn.Module:
    """The network of the search before its mixture: `mixture_search` builds the same one every time."""
    torch.manual_seed(5)
    torch.randn(32, 8), torch.randn(32, 8)
    base = Residual(depth=3, width=8)
    frozen = search.model.get_base_model().layers[0].base_layer.weight
    assert torch.equal(base.layers[0].weight, frozen.float())
    return base


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("scaling", ["alpha_over_r", "alpha_over_sqrt_r"])
@pytest.mark.parametrize(("top_k", "least"), [(2, None), (1, None), (2, 1), (2, 0)])
@pytest.mark.parametrize("masks", ["sampled", "hard"])
def test_what_is_likelier_than_not_carries_over(
    masks: str, top_k: int, least: int | None, scaling: str, dtype: torch.dtype, tolerance: float
) -> None:
    config = small_config(max_experts=4, max_rank=5, top_k=top_k, min_experts=least, masks=masks)
    search = _generic(mixture_search(config, scaling=scaling))
    with torch.no_grad():  # one module of few experts, one of many, and one that may go
        for m, favoured in enumerate((0, -1, 0)):
            search.vectors.experts[m, favoured] += 9
    search.model.to(dtype)
    plan = _unmasked_part(search)
    counts = [p.experts for p in plan.modules.values()]
    assert counts == [{None: top_k, 1: 1, 0: 0}[least], 4, {None: top_k, 1: 1, 0: 0}[least]]
    assert len({r for p in plan.modules.values() for r in p.ranks}) > 1
    final = _fresh(plan, _base_of(search)).to(dtype)
    x = torch.randn(20, 8, dtype=dtype)
    wanted = _searched_outputs(search, x)
    with torch.no_grad():
        assert (final(x) - wanted).abs().max() > 0.01
        carry_weights(search.model, search.vectors, final)
        assert (final(x) - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1)


@pytest.mark.parametrize("scaling", ["alpha_over_r", "constant"])
def test_one_expert_carries_over_exactly_under_soft_masks(scaling: str) -> None:
    """Without a router there is no offset to lose: soft masks fold into B whole."""
    config = small_config(max_experts=1, top_k=1, max_rank=4, masks="soft")
    search = _generic(mixture_search(config, scaling=scaling), 1.0)
    search.model.double()
    final = _fresh(search.mixture.plan, _base_of(search)).double()
    x = torch.randn(20, 8, dtype=torch.float64)
    carry_weights(search.model, search.vectors, final)
    with torch.no_grad():
        assert torch.allclose(final(x), _searched_outputs(search, x), rtol=1e-12, atol=1e-12)
        plain = search.model(x)
    assert not torch.allclose(final(x), plain, rtol=1e-3)


def test_heads_are_carried() -> None:
    search = _generic(mixture_search(small_config(), modules_to_save=["head"]))
    before = copy.deepcopy(search.model.state_dict())
    final = _fresh(_unmasked_part(search), _base_of(search), modules_to_save=["head"])
    x = torch.randn(6, 8)
    carry_weights(search.model, search.vectors, final)
    with torch.no_grad():
        assert torch.allclose(final(x), _searched_outputs(search, x), rtol=1e-5, atol=1e-5)
    after = search.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("masks", ["sampled", "soft"])
def test_rows_beyond_the_plan_are_left_behind(masks: str) -> None:
    """Expert e keeps its own first rows, wherever they lie in the packed matrix."""
    config = small_config(max_experts=3, max_rank=3, masks=masks)
    net = Residual(depth=1, width=8)
    base = copy.deepcopy(net)
    torch.manual_seed(5)
    search = Search(mixture(net, config), regression(8), config, 150)
    with torch.no_grad():
        search.vectors.ranks.copy_(torch.tensor([1.0, 0.0, 0.0]).expand_as(search.vectors.ranks))
    plan = Allocation({"layers.0": ModulePlan(8, 8, (2, 1), 2)}, alpha=search.mixture.plan.alpha)
    final = _fresh(plan, base)
    carry_weights(search.model, search.vectors, final)
    source, target = (m.get_base_model().layers[0] for m in (search.model, final))
    a, b = source.molora_A["default"], source.molora_B["default"]
    assert torch.equal(target.molora_A["default"], a[[0, 1, 3]])
    # Under sampled masks a row that was drawn contributed whole, however unlikely it was.
    mask = 1 if masks == "sampled" else search.vectors.masks()["layers.0"].rank[[0, 1, 3]]
    scale = torch.tensor([2 / 3, 2 / 3, 1 / 3])  # r_found / r_max
    assert torch.allclose(target.molora_B["default"], b[:, [0, 1, 3]] * mask * scale)
    assert torch.equal(target.molora_router["default"].weight, source.molora_router["default"].weight[:2])
