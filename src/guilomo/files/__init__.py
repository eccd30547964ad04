"""Files that are written whole or not at all, and checked when they are read. Nothing is ever unpickled."""

from guilomo.files.adapter import check_adapter, check_checksum, refuse_pickle, save_adapter, write_checksum
from guilomo.files.atomic import replacing
from guilomo.files.optimizer import optimizer_tensors, restore_optimizer
from guilomo.files.random_numbers import random_tensors, restore_random
from guilomo.files.state import flat, load_state, refuse_other, save_state, unflat

__all__ = [
    "check_adapter",
    "check_checksum",
    "flat",
    "load_state",
    "optimizer_tensors",
    "random_tensors",
    "refuse_other",
    "refuse_pickle",
    "replacing",
    "restore_optimizer",
    "restore_random",
    "save_adapter",
    "save_state",
    "unflat",
    "write_checksum",
]
