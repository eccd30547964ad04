"""Which path a layer takes by itself, and that one can be asked for."""

from __future__ import annotations

import pytest
import torch

from guilomo.errors import GuilomoError
from guilomo.layers.paths import PATHS, forced, sorting_pays, using

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sorting_pays_for_many_rank_rows_and_tokens_and_few_chosen_experts(dtype: torch.dtype) -> None:
    assert sorting_pays(4096, 2048, 2, 16, dtype, CPU)
    assert not sorting_pays(4096, 64, 2, 8, dtype, CPU)
    assert not sorting_pays(1, 2048, 2, 16, dtype, CPU)
    assert not sorting_pays(4096, 2048, 16, 16, dtype, CPU)  # all are chosen: nothing is saved
    assert not sorting_pays(4096, 2048, 2, 16, dtype, CUDA)  # not measured there


def test_fewer_tokens_need_more_rank_rows() -> None:
    least = [next(r for r in range(1, 10**5) if sorting_pays(t, r, 2, 16, torch.float32, CPU)) for t in (128, 256, 512)]
    assert least[0] > least[1] > least[2]
    assert least[2] == next(r for r in range(1, 10**5) if sorting_pays(10**6, r, 2, 16, torch.float32, CPU))


def test_asking_for_a_path() -> None:
    assert forced() is None
    with using("sorted"), using("packed"):
        assert forced() == "packed"
    assert forced() is None
    with pytest.raises(GuilomoError, match=r"path = 'fast'.*fused, joined, kernels, packed, sorted"), using("fast"):
        pass
    assert set(PATHS) == {"packed", "fused", "joined", "sorted", "kernels"}
