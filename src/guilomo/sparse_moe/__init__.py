"""Pretrained sparse mixtures of experts: their experts as low-rank changes of a common feed-forward."""

from guilomo.sparse_moe.extract import EFFECTIVE, balanced_factors, effective_rank, extracted_mixture
from guilomo.sparse_moe.read import SparseBlock, sparse_blocks

__all__ = [
    "EFFECTIVE",
    "SparseBlock",
    "balanced_factors",
    "effective_rank",
    "extracted_mixture",
    "sparse_blocks",
]
