from __future__ import annotations

import pytest

from guilomo.allocation import ModuleShape, depths_of, layers_of, mola, site


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.3.attention.self.query", ("encoder.layer.3", "attention.self.query")),
        ("model.layers.11.experts.2.up", ("model.layers.11", "experts.2.up")),
        ("lm_head", (None, "lm_head")),
        ("head.0", (None, "head.0")),
        ("0.q", ("0", "q")),
    ],
)
def test_site_splits_at_the_first_integer(name: str, expected: tuple[str | None, str]) -> None:
    assert site(name) == expected


def test_layers_are_numbered_from_zero_whatever_their_numbers() -> None:
    assert layers_of(["h.4.q", "h.4.k", "h.7.q"]) == {"h.4.q": 0, "h.4.k": 0, "h.7.q": 1}


def test_alphabetical_order_of_names_does_not_shuffle_the_layers(llama: dict[str, ModuleShape]) -> None:
    assert layers_of(sorted(llama)) == layers_of(llama)


def test_stacks_and_single_modules_come_in_order_of_first_appearance() -> None:
    names = ["embed", "encoder.0.q", "encoder.1.q", "decoder.0.q", "head"]
    assert list(layers_of(names).values()) == [0, 1, 2, 3, 4]


def test_modules_outside_layers_share_the_depth_of_the_layer_before_them() -> None:
    names = ["embed", "encoder.0.q", "encoder.1.q", "decoder.0.q", "head"]
    assert list(depths_of(names).values()) == [0, 0, 1, 2, 2]
    assert depths_of(["a", "b"]) == {"a": 0, "b": 1}


def test_a_pooler_does_not_take_a_group_of_its_own() -> None:
    names = ["layer.0.q", "layer.1.q", "pooler.dense"]
    plan = mola({name: ModuleShape(8, 8) for name in names}, groups=[2, 4])
    assert [plan[name].experts for name in names] == [2, 4, 4]
