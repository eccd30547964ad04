"""What all tests share: no network, a fixed seed, one thread, and the folder of real data where there is one."""

from __future__ import annotations

import gc
import os

# Before any import of huggingface_hub: saving an adapter would otherwise ask the Hub about the base model.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For the processes that tests start: several tests run side by side, and each has one core.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from guilomo.layers.paths import PATHS, using

# The matrices are tiny: more threads cost more than they save, and one thread makes sums repeatable.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Every training of a `Trainer` ends with a full garbage collection, which would take longer than a tiny training.

    Frozen, the modules, classes and tests that are there anyway are not looked through each time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(params=[path for path in PATHS if path != "kernels"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every way of computing a mixture on a CPU; one that cannot serve steps aside. For kernels see test_kernels.py."""
    with using(request.param):
        yield request.param


@pytest.fixture
def data_dir() -> Path:
    """The folder named by GUILOMO_DATA; tests that need real data or models skip without it."""
    folder = os.environ.get("GUILOMO_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set GUILOMO_DATA to the folder with the data sets (and models) to run this test")
    return Path(folder)
