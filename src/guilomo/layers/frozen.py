"""Frozen random matrices that are made again from a seed and a name, and so need not be saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseGaussian:
    """``(rows, columns)`` with exactly `nonzeros` Gaussian entries of deviation `deviation` in every row.

    Equal fields give equal bits on every machine: numpy's legacy generator, whose numbers are frozen, is rounded to
    bfloat16, so that neither a last digit of another C library nor the precision that a model is held in matters.
    """

    seed: int
    name: str
    rows: int
    columns: int
    nonzeros: int
    deviation: float

    def __call__(self) -> Tensor:
        """The matrix, float32."""
        digest = hashlib.sha256(f"{self.seed} {self.name}".encode()).digest()
        random = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        places = random.random_sample((self.rows, self.columns)).argsort(1, kind="stable")[:, : self.nonzeros]
        values = np.zeros((self.rows, self.columns))
        np.put_along_axis(values, places, self.deviation * random.standard_normal((self.rows, self.nonzeros)), 1)
        return torch.from_numpy(values).to(torch.bfloat16).float()
