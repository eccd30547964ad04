"""Counts what torch runs: kernels, and operations whose result depends on the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

NO_WORK = {
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "is_same_size",
    "sym_size",
    "sym_numel",
    "sym_stride",
    "sym_storage_offset",
}
"""Operations that make a tensor or look at one without touching data, beside the views that torch marks as such."""
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")
DEPENDS_ON_DATA = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


@dataclass
class Counts:
    """Operations by name.

    Attributes:
        kernels: everything that touches data.
        data_dependent: those among them whose result has a shape that depends on the data, or is a number on the host.
            Each one makes an accelerator wait for the host, and breaks a compiled graph.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    data_dependent: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, int]:
        return {"kernels": self.kernels.total(), "data_dependent": self.data_dependent.total()}


def count(work: Callable[[], object]) -> Counts:
    """The operations of one call, those of its backward included if it runs one."""
    with _Counting() as counting:
        work()
    return counting.counts


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        data_dependent = _depends_on_data(func, name, args, out)
        if data_dependent:
            self.counts.data_dependent[name] += 1
        # Questions about sizes and dtypes give no tensor.
        if data_dependent or (not func.is_view and name not in NO_WORK and _has_tensor(out)):
            self.counts.kernels[name] += 1
        return out


def _has_tensor(out: Any) -> bool:
    return any(isinstance(part, Tensor) for part in tree_iter(out))


def _depends_on_data(func: Any, name: str, args: Sequence[Any], out: Any) -> bool:
    # torch tags every `index` as of dynamic shape, for one kind of index it is.
    if name in INDEXING:
        return _indexes_by_bool(args)
    return bool(DEPENDS_ON_DATA.intersection(func.tags)) or _to_host(name, args, out)


def _indexes_by_bool(args: Sequence[Any]) -> bool:
    """A mask as an index is turned into positions first, out of sight of the dispatcher."""
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _to_host(name: str, args: Sequence[Any], out: Any) -> bool:
    if name not in ("_to_copy", "copy_"):
        return False
    source = args[1] if name == "copy_" else args[0]
    return isinstance(source, Tensor) and source.device.type != "cpu" and out.device.type == "cpu"
