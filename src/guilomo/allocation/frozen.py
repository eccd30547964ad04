"""A read-only dictionary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class FrozenDict(Mapping[Key, Value]):
    """A mapping that cannot be changed after it was made; keeps order, compares equal to a dict of equal items.

    Not `types.MappingProxyType`, because plans are pickled into worker processes and deep-copied with PEFT's
    configuration objects, and a proxy supports neither.
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[Key, Value]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: Key) -> Value:
        return self._items[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)
