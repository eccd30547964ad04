"""Full experts as low-rank changes of a common feed-forward: of sparse models, and of models fine-tuned from one."""

from guilomo.sparse_moe.base import feed_forwards
from guilomo.sparse_moe.extract import extracted_mixture
from guilomo.sparse_moe.extraction import Extraction
from guilomo.sparse_moe.factors import EFFECTIVE, RankChoice, balanced_factors, effective_rank
from guilomo.sparse_moe.folders import models_in
from guilomo.sparse_moe.models import extraction_of_models, mixture_of_models, ranks_by_name
from guilomo.sparse_moe.read import SparseBlock, sparse_blocks

__all__ = [
    "EFFECTIVE",
    "Extraction",
    "RankChoice",
    "SparseBlock",
    "balanced_factors",
    "effective_rank",
    "extracted_mixture",
    "extraction_of_models",
    "feed_forwards",
    "mixture_of_models",
    "models_in",
    "ranks_by_name",
    "sparse_blocks",
]
