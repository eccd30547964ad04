"""A cheaper precision of products is taken only where it is as exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from guilomo.errors import GuilomoError
from guilomo.run import precision
from guilomo.run.precision import product_error, use_matmul_precision
from tiny_runs import run_of


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def errors(monkeypatch: pytest.MonkeyPatch, medium: float) -> None:
    by_precision = {"highest": 3e-7, "medium": medium}
    monkeypatch.setattr(precision, "product_error", lambda: by_precision[torch.get_float32_matmul_precision()])


def test_the_measured_error_is_that_of_float32() -> None:
    assert 1e-8 < product_error() < 1e-5


def test_as_exact_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    errors(monkeypatch, 8e-7)
    assert use_matmul_precision("medium") == 8e-7
    assert torch.get_float32_matmul_precision() == "medium"


def test_half_precision_is_refused_and_nothing_is_left_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    errors(monkeypatch, 3e-3)
    with pytest.raises(GuilomoError, match=r"model.matmul_precision = 'medium' is not usable .* 3.0e-03 .*'highest'"):
        use_matmul_precision("medium")
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_recipe_asks_for_it(colour_recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    errors(monkeypatch, 8e-7)
    run = run_of(colour_recipe(model={"matmul_precision": "medium"}))
    run.fresh_model(0)
    assert torch.get_float32_matmul_precision() == "medium"
    run_of(colour_recipe("other")).fresh_model(0)  # by default, as ever
    assert torch.get_float32_matmul_precision() == "highest"
