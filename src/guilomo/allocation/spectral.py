"""AlphaLoRA: more experts where the weight spectrum looks less trained (arXiv 2410.10054)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from guilomo.allocation.layerwise import Shapes, Terms, by_layer, layer_count
from guilomo.allocation.modules import positive_int
from guilomo.allocation.names import depths_of
from guilomo.allocation.plan import Allocation
from guilomo.allocation.rounding import apportion, half_up
from guilomo.errors import GuilomoError, invalid, unknown

if TYPE_CHECKING:
    import torch

ROUNDINGS = ("largest_remainder", "published")


def hill_alpha(weight: torch.Tensor) -> float:
    """Hill estimate of the power-law exponent of the eigenvalue spectrum of W^T W.

    With the n non-zero eigenvalues in rising order and m = floor(n/2):
    alpha = 1 + m / sum_{i=1..m} ln(lambda_{n-i+1} / lambda_{n-m}). Heavier tails give smaller values.
    Eigenvalues that are zero up to rounding are left out, so a rank-deficient weight has a finite exponent.
    Source: AlphaLoRA; computed in float64.

    Args:
        weight: (O, I), floating point, dequantised.

    Raises:
        GuilomoError: not a finite matrix, fewer than two non-zero eigenvalues, or all of the tail equal.
    """
    import torch  # here, so that plans can be read and printed without the seconds that loading torch takes

    if weight.ndim != 2 or not weight.is_floating_point():
        raise invalid("weight", f"{tuple(weight.shape)} {weight.dtype}", "a floating-point matrix", "Dequantise it.")
    on_host = weight.device.type == "mps"  # which has no float64
    matrix = (weight.detach().cpu() if on_host else weight.detach()).double()
    if not bool(torch.isfinite(matrix).all()):
        raise invalid("weight", "NaN or infinity", "finite numbers")
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram)
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
    values = values[values > floor]
    count = len(values) // 2
    if count == 0:
        raise invalid("weight", f"rank {len(values)}", "a matrix of rank 2 or more", "Give this layer's alpha by hand.")
    spread = float((values[-count:] / values[-count - 1]).log().sum())
    if spread <= count * 1e-12:
        raise invalid("weight", "equal eigenvalues", "a spectrum with a tail", "Give this layer's alpha by hand.")
    return 1 + count / spread


def alphalora(
    shapes: Shapes,
    alphas: Sequence[float] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    total_experts: int | None = None,
    beta: float = 2.5,
    rank: int = 8,
    rounding: str = "largest_remainder",
    **terms: Unpack[Terms],
) -> Allocation:
    """Experts of layer l in proportion to alpha_l^beta, at least 1; the same for all modules of the layer.

    A layer with fewer experts than top_k uses all of them (`top_k_floor` is False unless given). A budget scales
    the ranks.

    Args:
        shapes: module -> (I, O).
        alphas: one exponent per layer, low layers first. Give either these or
        weights: module -> (O, I); a layer's exponent is then the mean of `hill_alpha` over its modules.
        total_experts: sum of the layers' counts; 5 per layer unless given (160 for 32 layers, as published).
        beta: how strongly the exponent counts.
        rank: of every expert.
        rounding: "largest_remainder" keeps the total exactly. "published" repeats the fix-up that circulates with
            the paper's allocations and takes surplus experts from the layer with the largest exponent.
        terms: see `fit`.

    Raises:
        GuilomoError: not exactly one of alphas and weights, a wrong number of them, or values that cannot be.
    """
    positive_int("rank", rank)
    layers = layer_count(shapes)
    exponents = _exponents(shapes, alphas, weights, layers)
    total = 5 * layers if total_experts is None else positive_int("total_experts", total_experts)
    counts = alphalora_counts(exponents, total, beta, rounding)
    terms.setdefault("top_k_floor", False)
    label = f"alphalora(total_experts={total}, beta={beta:g}, rank={rank}, rounding={rounding})"
    return by_layer(shapes, counts, [rank] * layers, label, **terms)


def alphalora_counts(
    alphas: Sequence[float], total: int, beta: float = 2.5, rounding: str = "largest_remainder"
) -> list[int]:
    """Expert counts of the layers, each at least 1, summing to `total`.

    Raises:
        GuilomoError: an exponent that is not finite and positive, fewer experts than layers, an unknown rounding.
    """
    for layer, value in enumerate(alphas):
        if not 0 < value < math.inf:
            raise invalid(f"alphas[{layer}]", value, "a finite number above 0")
    if not math.isfinite(beta):
        raise invalid("beta", beta, "a finite number")
    if total < len(alphas):
        raise invalid("total_experts", total, f"at least one per layer, {len(alphas)}")
    if rounding not in ROUNDINGS:
        raise unknown("rounding", rounding, ROUNDINGS)
    powers = [alpha**beta for alpha in alphas]
    return _published(powers, total) if rounding == "published" else _at_least_one(powers, total)


def _at_least_one(powers: Sequence[float], total: int) -> list[int]:
    """Largest remainder; layers whose share is below 1 get 1 and the others share the rest."""
    starved: set[int] = set()
    while True:
        rest = [layer for layer in range(len(powers)) if layer not in starved]
        shared = apportion([powers[layer] for layer in rest], total - len(starved))
        counts = dict(zip(rest, shared, strict=True))
        below = {layer for layer, count in counts.items() if count < 1}
        if not below:
            return [counts.get(layer, 1) for layer in range(len(powers))]
        starved |= below


def _published(powers: Sequence[float], total: int) -> list[int]:
    """Rounds each share, then moves single experts where power minus count is largest until the total is met.

    The power is not normalised to the total there, which is why the correction falls on the largest exponent.
    """
    scale = total / math.fsum(powers)
    counts = [max(1, half_up(power * scale)) for power in powers]
    while (surplus := sum(counts) - total) != 0:
        layers = [layer for layer in range(len(counts)) if surplus < 0 or counts[layer] > 1]
        target = max(layers, key=lambda layer: powers[layer] - counts[layer])
        counts[target] -= 1 if surplus > 0 else -1
    return counts


def _exponents(
    shapes: Shapes, alphas: Sequence[float] | None, weights: Mapping[str, torch.Tensor] | None, layers: int
) -> list[float]:
    """One exponent per layer from whichever was given."""
    if (alphas is None) == (weights is None):
        given = "neither" if alphas is None else "both"
        raise invalid("alphas, weights", given, "one of the two", "Give alphas per layer, or the model's weights.")
    if alphas is not None:
        if len(alphas) != layers:
            raise invalid("alphas", list(alphas), f"one number for each of the {layers} layers")
        return [float(alpha) for alpha in alphas]
    found: list[list[float]] = [[] for _ in range(layers)]
    for name, layer in depths_of(shapes).items():
        found[layer].append(_alpha_of(name, weights or {}))
    return [math.fsum(values) / len(values) for values in found]


def _alpha_of(name: str, weights: Mapping[str, torch.Tensor]) -> float:
    if name not in weights:
        raise invalid(f"weight of module {name!r}", None, "the (O, I) weight of every module in shapes")
    try:
        return hill_alpha(weights[name])
    except GuilomoError as error:
        raise GuilomoError(f"module {name!r}: {error}") from None
