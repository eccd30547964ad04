"""Cheaper float32 products on CPUs, where they are as exact (ours)."""

from __future__ import annotations

import torch

from guilomo.errors import GuilomoError

LARGEST = 10.0
"""Times the error of ordinary float32 products that the error may be."""


def use_matmul_precision(wanted: str) -> float:
    """Sets torch's precision of float32 products for this process, if the CPU computes them about as exactly.

    "medium" lets oneDNN choose: on some processors another float32 kernel, up to twice as fast; on those with matrix
    units for bfloat16 it computes in bfloat16, which is refused here, because it would change results without a word.

    Args:
        wanted: "highest", "high" or "medium", see `torch.set_float32_matmul_precision`.

    Returns:
        The measured error of a product, relative to its largest entry.

    Raises:
        GuilomoError: the error is more than ten times that of "highest".
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    ordinary = product_error()
    torch.set_float32_matmul_precision(wanted)
    found = product_error()
    if found > LARGEST * ordinary:
        torch.set_float32_matmul_precision(before)
        raise GuilomoError(
            f"model.matmul_precision = {wanted!r} is not usable on this processor: a float32 product has the relative "
            f"error {found:.1e} instead of {ordinary:.1e}, that of half precision. Leave it at 'highest', or say that "
            "half precision is meant with model.dtype = bfloat16."
        )
    return found


def product_error() -> float:
    """The largest error of a random ``(256, 1024) @ (1024, 256)`` in float32, relative to its largest entry."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((256, 1024), (1024, 256)))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())
