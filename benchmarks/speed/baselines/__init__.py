"""Other ways to compute the same mixture, written from their descriptions."""

from __future__ import annotations

from benchmarks.speed.baselines.dense_einsum import DenseEinsum
from benchmarks.speed.baselines.grouped_gemm import GroupedGemm
from benchmarks.speed.baselines.mixture import Mixture
from benchmarks.speed.baselines.sparse_loop import SparseLoop

BASELINES: dict[str, type[Mixture]] = {
    "sparse_loop": SparseLoop,
    "dense_einsum": DenseEinsum,
    "grouped_gemm": GroupedGemm,
}

__all__ = ["BASELINES", "DenseEinsum", "GroupedGemm", "Mixture", "SparseLoop"]
