"""What the sentences say follows the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from guilomo.export import card, sentences


def _score(value: float | None, half: float = 0.25) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "n": 9}
    return {"value": value, "low": value - half, "high": value + half, "n": 9}


def _report(**changes: Any) -> dict[str, Any]:
    measures = {"loss_added": _score(0.5), "agreement": _score(0.75), "gain_kept": _score(0.5)}
    base = {
        "to": "svd",
        "rank": 2,
        "head_saved": False,
        "gates_from": {"split": "train", "rows": 7},
        "measured_on": {"task": "films", "split": "test", "rows": 9, "data_hash": "x"},
        "measures": measures,
        "modules": {"a": {"energy": 0.75}, "b": {"energy": 0.5}},
    }
    return {**base, **changes}


def test_everything_lost_is_said() -> None:
    assert sentences(_report()) == [
        "The gates are means over 7 train rows; the mixture's own differ between tokens, or tasks, which "
        "those of one plain LoRA cannot.",
        "Rank 2 keeps at least 50.0 % of a module's energy (b).",
        "On 9 test rows of films the export's loss differs from the mixture's by +0.5000 nats per prediction "
        "(95 % interval +0.2500 to +0.7500); 75.0 % of the predictions are the same.",
        "The export keeps 50.0 % (95 % interval 25.0 to 75.0) of what the mixture gains over the base model.",
    ]


def test_constant_gates_and_no_gain() -> None:
    measures = {"loss_added": _score(0.0), "agreement": _score(1.0)}
    said = sentences(_report(to="stacked", rank=None, gates_from=None, head_saved=True, measures=measures))
    assert len(said) == 3
    assert "freezing them loses nothing" in said[0]
    assert "not surely better than the base model with its untrained head" in said[2]


def test_a_loss_that_is_not_finite() -> None:
    measures = {"loss_added": _score(None), "agreement": _score(0.5)}
    assert "a loss is not finite" in sentences(_report(measures=measures))[2]


@pytest.mark.parametrize(
    ("base", "to", "lines"),
    [
        ("org/model", "svd", ["library_name: peft", "base_model: org/model"]),
        ("org/model", "merged", ["library_name: transformers", "base_model: org/model"]),
        (".", "stacked", ["library_name: peft"]),
        (None, "stacked", ["library_name: peft"]),
    ],
)
def test_the_card_names_the_base_only_where_the_hub_knows_it(base: str | None, to: str, lines: list[str]) -> None:
    text = card(_report(to=to), base)
    header = text.split("---")[1].strip().splitlines()
    assert [line for line in header if not line.startswith("tags")] == lines
    for sentence in sentences(_report(to=to)):
        assert f"- {sentence}" in text
