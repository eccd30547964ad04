"""What docs/results.md and docs/regimes.md show of a results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from benchmarks import recipe_results, regimes_figure


def method(name: str, losses: list[float]) -> dict[str, Any]:
    mean = sum(losses) / len(losses)
    summary = {"loss": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
    runs = [{"metrics": {"loss": {"value": loss}}} for loss in losses]
    return {"name": name, "label": name.upper(), "parameters": 96, "sweep": None, "summary": summary, "runs": runs}


def results(budget: int, *methods: dict[str, Any]) -> dict[str, Any]:
    test = {"a": "guilomo", "b": "random", "metric": "loss", "difference": -0.0312, "low": -0.05, "high": -0.01}
    return {
        "name": f"novels-{budget}",
        "budget": {"parameters": budget},
        "methods": list(methods),
        "tests": [{**test, "p": 0.0004, "p_corrected": 0.0008}, {**test, "metric": "accuracy", "difference": 9.0}],
        "primary_metric": "loss",
        "config": {"seeds": [0, 1]},
        "hardware": {"cores": 2},
        "seconds": {"total": 3.0},
        "search": None,
        "model": {"name": "m"},
        "data": {"kind": "lm", "sizes": {"train": 3, "held_out": 2, "test": 1}},
        "verdict": ["It is so."],
    }


def test_a_section_shows_the_paired_difference_of_losses() -> None:
    text = recipe_results.section(results(480, method("guilomo", [3.0, 3.1]), method("random", [3.2])), "regimes")
    assert "| RANDOM | 3.200 [3.100, 3.300] | -0.031 [-0.050, -0.010], p < 0.001 | 96 |" in text
    assert "| GUILOMO | 3.050 [2.950, 3.150] | – | 96 |" in text
    assert "- It is so." in text


def test_the_picture_has_a_mark_for_every_method_and_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[float]] = {}
    original = Axes.errorbar

    def spy(axes: Axes, xs: Any, means: Any, *rest: Any, **options: Any) -> Any:
        drawn[options["label"]] = list(means)
        return original(axes, xs, means, *rest, **options)

    monkeypatch.setattr(Axes, "errorbar", spy)
    small = results(480, method("guilomo", [3.0, 3.1]), method("lora-v", [3.2, 3.3]), method("random", [3.4, 3.3]))
    large = results(960, method("guilomo", [2.9, 2.8]), method("lora", [3.0, 3.1]))
    regimes_figure.write_figure([large, small], tmp_path / "picture.png")
    found = {label.split()[0]: means for label, means in drawn.items()}
    assert found["GuiLoMo"] == pytest.approx([3.05, 2.85])
    assert found["plain"] == pytest.approx([3.25, 3.05])
    assert found["random"] == pytest.approx([3.35])
    assert found["searched,"] == []
    assert (tmp_path / "picture.png").stat().st_size > 10_000
