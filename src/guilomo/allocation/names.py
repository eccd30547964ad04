"""Dotted module names: which layer and which projection a name belongs to."""

from __future__ import annotations

from collections.abc import Iterable


def site(name: str) -> tuple[str | None, str]:
    """Splits a dotted name behind its first integer component.

    `encoder.layer.3.attention.self.query` becomes (`encoder.layer.3`, `attention.self.query`). A name without an
    integer, or with one only at its very end (`head.0`: a numbered linear, not a layer of several), has no layer
    and becomes (None, name). Source: ours.
    """
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: index + 1]), ".".join(parts[index + 1 :])
    return None, name


def layers_of(names: Iterable[str]) -> dict[str, int]:
    """Maps each module name to its 0-based layer index.

    Stacks (`encoder.layer`, `decoder.layer`) come in order of first appearance; inside a stack the layers come in
    numerical order, so that an alphabetically sorted list of names (layer 10 before layer 2) gives the same
    indices. A module without a layer is a layer of its own. Source: ours.
    """
    names = list(names)
    stacks: dict[str, int] = {}
    places = {name: _place(name, stacks) for name in names}
    index = {place: position for position, place in enumerate(sorted(set(places.values())))}
    return {name: index[places[name]] for name in names}


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """As `layers_of`, but modules outside all layers (poolers, heads) share the depth of the layer before them.

    Strategies that shape a plan by depth divide real layers; a pooler must not take the place of one. Where no layer
    comes before, the first is taken; where there are no layers at all, `layers_of` holds. Source: ours.
    """
    names = list(names)
    inside = layers_of(name for name in names if site(name)[0] is not None)
    if not inside:
        return layers_of(names)
    depths: dict[str, int] = {}
    last_before = 0
    for name in names:
        last_before = max(last_before, inside.get(name, 0))
        depths[name] = inside.get(name, last_before)
    return depths


def _place(name: str, stacks: dict[str, int]) -> tuple[int, int]:
    """(position of the name's stack, number inside the stack); enters new stacks into `stacks`."""
    layer, _ = site(name)
    stack, number = (name, 0) if layer is None else (layer.rpartition(".")[0] + ".", int(layer.rpartition(".")[2]))
    return stacks.setdefault(stack, len(stacks)), number
