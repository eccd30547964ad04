"""Router health on routings whose numbers are known."""

from __future__ import annotations

import math

import pytest
import torch

from guilomo.layers import Routing, router_health, router_statistics


def _routing(weights: list[list[float]]) -> Routing:
    w = torch.tensor(weights, dtype=torch.float64)
    return Routing(w, w, w > 0)


def test_even_and_undecided() -> None:
    health = router_health(router_statistics(_routing([[0.5, 0.5], [0.5, 0.5]]), None))
    assert health.load == (0.5, 0.5)
    assert health.load_entropy == pytest.approx(1.0)
    assert health.token_entropy == pytest.approx(1.0)
    assert health.dead == ()


def test_collapse() -> None:
    health = router_health(router_statistics(_routing([[0.0, 1.0, 0.0]] * 4), None))
    assert health.load == (0.0, 1.0, 0.0)
    assert health.load_entropy == 0
    assert health.token_entropy == 0
    assert health.dead == (0, 2)


def test_decided_tokens_with_uneven_load() -> None:
    health = router_health(router_statistics(_routing([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), None))
    assert health.load == (0.75, 0.25)
    assert health.load_entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2))
    assert health.token_entropy == 0
    assert health.to_dict()["load"] == (0.75, 0.25)


def test_dead_threshold_is_a_fraction_of_the_even_share() -> None:
    statistics = router_statistics(_routing([[1.0, 0.0]] * 9 + [[0.0, 1.0]]), None)
    assert router_health(statistics, dead_below=0.1).dead == ()
    assert router_health(statistics, dead_below=0.3).dead == (1,)


def test_padding_and_no_tokens() -> None:
    routing = _routing([[1.0, 0.0], [0.0, 1.0]])
    assert router_health(router_statistics(routing, torch.tensor([1, 0]))).load == (1.0, 0.0)
    empty = router_health(router_statistics(routing, torch.tensor([0, 0])))
    assert empty.load == (0.0, 0.0)
    assert empty.load_entropy == 0


def test_one_expert() -> None:
    health = router_health(router_statistics(_routing([[1.0]] * 3), None))
    assert (health.load, health.load_entropy, health.dead) == ((1.0,), 0.0, ())
