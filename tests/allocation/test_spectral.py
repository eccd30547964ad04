from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from guilomo.allocation import ModuleShape, alphalora, alphalora_counts, hill_alpha, uniform
from guilomo.errors import GuilomoError

# Exponents of LLaMA-2-7B as MoLA's appendix prints them, and the counts that follow from them.
LLAMA2 = [
    *(2.14, 2.74, 3.03, 3.12, 3.20, 3.15, 3.01, 3.04, 2.79, 2.85, 2.75, 2.72, 2.96, 2.97, 3.03, 3.15),
    *(3.45, 3.72, 4.02, 3.77, 4.37, 4.55, 4.32, 4.18, 4.25, 4.20, 3.74, 4.25, 4.22, 4.13, 4.42, 3.44),
]
EXACT = [1, 3, 3, 4, 4, 4, 3, 3, 3, 3, 3, 2, 3, 3, 3, 4, 5, 5, 7, 6, 8, 9, 8, 7, 8, 7, 6, 8, 8, 7, 8, 4]
PUBLISHED = [1, 3, 3, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 5, 6, 7, 6, 8, 6, 8, 7, 8, 7, 6, 8, 8, 7, 8, 5]


def test_counts_of_llama_2() -> None:
    assert alphalora_counts(LLAMA2, 160) == EXACT
    assert alphalora_counts(LLAMA2, 160, rounding="published") == PUBLISHED


def test_a_plan_lets_small_layers_use_all_they_have(llama: dict[str, ModuleShape]) -> None:
    plan = alphalora(llama, LLAMA2)
    first, last = plan["model.layers.0.mlp.up_proj"], plan["model.layers.31.mlp.up_proj"]
    assert (first.experts, first.top_k) == (1, 1)
    assert (last.experts, last.top_k) == (4, 2)
    assert sum(module.experts for module in plan.modules.values()) == 7 * 160
    floored = alphalora(llama, LLAMA2, top_k_floor=True)
    assert floored["model.layers.0.mlp.up_proj"].experts == 2


@pytest.mark.parametrize("rounding", ["largest_remainder", "published"])
def test_every_layer_keeps_an_expert_and_the_total_holds(rounding: str) -> None:
    for total in (4, 5, 9, 40):
        counts = alphalora_counts([1.1, 9.0, 1.2, 8.0], total, rounding=rounding)
        assert sum(counts) == total
        assert min(counts) >= 1


def hill_by_hand(weight: torch.Tensor) -> float:
    """The formula written out over sorted eigenvalues, with singular values instead of the Gram matrix."""
    values = sorted(float(value) ** 2 for value in torch.linalg.svdvals(weight.double()))
    n, m = len(values), len(values) // 2
    return 1 + m / sum(math.log(values[n - i] / values[n - m - 1]) for i in range(1, m + 1))


@pytest.mark.parametrize("shape", [(24, 24), (7, 31), (31, 7), (2, 2)])
def test_hill_follows_the_formula(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = hill_by_hand(weight)
    assert hill_alpha(weight) == pytest.approx(expected, rel=1e-6)
    assert hill_alpha(100 * weight.T) == pytest.approx(expected, rel=1e-6)


def test_hill_recovers_a_power_law() -> None:
    # Quantiles of a Pareto tail with survival function x^-(alpha-1).
    n, alpha = 1000, 3.0
    values = torch.tensor([(1 - (i + 0.5) / n) ** (-1 / (alpha - 1)) for i in range(n)], dtype=torch.float64)
    assert hill_alpha(torch.diag(values.sqrt())) == pytest.approx(alpha, rel=0.02)


def test_a_rank_deficient_weight_has_a_finite_exponent() -> None:
    full = torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    padded = torch.cat([full, torch.zeros(10, 40, dtype=torch.float64)])
    assert hill_alpha(padded) == pytest.approx(hill_alpha(full), rel=1e-6)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 4), "rank 0"),
        (torch.ones(4, 4), "rank 1"),
        (torch.eye(8), "equal eigenvalues"),
        (torch.full((4, 4), float("nan")), "NaN"),
        (torch.ones(4), "matrix"),
        (torch.ones(4, 4, dtype=torch.int8), "Dequantise"),
    ],
)
def test_spectra_without_an_exponent_are_refused(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        hill_alpha(weight)


def test_weights_are_averaged_over_a_layer() -> None:
    generator = torch.Generator().manual_seed(2)
    names = ["h.0.q", "h.0.k", "h.1.q", "h.1.k"]
    weights = {name: torch.randn(12, 20, generator=generator) ** (1 + index) for index, name in enumerate(names)}
    shapes = {name: ModuleShape(20, 12) for name in names}
    alphas = [sum(hill_alpha(weights[f"h.{layer}.{name}"]) for name in "qk") / 2 for layer in range(2)]
    assert alphalora(shapes, weights=weights).modules == alphalora(shapes, alphas).modules
    with pytest.raises(GuilomoError, match=r"weight of module 'h\.1\.k' = None"):
        alphalora(shapes, weights={name: weights[name] for name in names[:3]})
    with pytest.raises(GuilomoError, match=r"module 'h\.0\.q': weight = 'rank 0'"):
        alphalora(shapes, weights={**weights, "h.0.q": torch.zeros(12, 20)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither"),
        ({"alphas": [1.0] * 6, "weights": {}}, "both"),
        ({"alphas": [2.0] * 5}, "one number for each of the 6 layers"),
        ({"alphas": [2.0] * 5 + [-1.0]}, r"alphas\[5\] = -1\.0"),
        ({"alphas": [2.0] * 6, "total_experts": 5}, "at least one per layer, 6"),
        ({"alphas": [2.0] * 6, "rounding": "publised"}, "Did you mean 'published'"),
        ({"alphas": [2.0] * 6, "beta": math.inf}, "beta = inf"),
    ],
)
def test_bad_arguments_are_named(minilm: dict[str, ModuleShape], options: dict[str, Any], message: str) -> None:
    with pytest.raises(GuilomoError, match=message):
        alphalora(minilm, **options)


def test_equal_exponents_are_uniform(minilm: dict[str, ModuleShape]) -> None:
    assert alphalora(minilm, [3.0] * 6).modules == uniform(minilm, experts=5, rank=8).modules
