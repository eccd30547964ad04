"""What may change in the settings of a folder that is continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from guilomo.errors import GuilomoError
from guilomo.run.claim import refuse_changes

SAVED: dict[str, Any] = {
    "methods": [{"name": "lora", "options": {}}, {"name": "mola", "options": {"groups": [2, 4]}}],
    "tasks": [{"name": "cola"}],
    "seeds": [3, 1],
    "sweep": {"learning_rates": [0.01, 0.1]},
    "train": {"epochs": 1},
}


def claim(resume: bool = True, **changes: object) -> None:
    refuse_changes("comparison", Path("out"), SAVED, {**SAVED, **changes}, resume)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"methods": [{"name": "smora", "options": {}}, *SAVED["methods"]]},
        {"methods": SAVED["methods"][::-1]},
        {"tasks": [{"name": "rte"}, {"name": "cola"}]},
        {"seeds": [3, 2, 1]},
        {"sweep": {"learning_rates": [1.0, 0.1, 0.01]}},
    ],
)
def test_what_is_added_is_no_change(changes: dict[str, Any]) -> None:
    claim(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": SAVED["methods"][:1]}, r"methods.mola: .* there, None now"),
        ({"methods": [SAVED["methods"][0], {"name": "mola", "options": {}}]}, r"mola.options.groups: \[2, 4\] there"),
        ({"tasks": []}, r"tasks.cola: .* there, None now"),
        ({"seeds": [1, 3]}, r"first seed: 3 there, 1 now"),
        ({"seeds": [3]}, r"seeds.1: 'present' there, None now"),
        ({"sweep": {"learning_rates": [0.1, 1.0]}}, r"learning rates.0.01: 'present' there, None now"),
        ({"sweep": {"learning_rates": []}}, r"swept: True there, False now"),
        ({"train": {"epochs": 2}}, r"train.epochs: 1 there, 2 now"),
    ],
)
def test_what_was_there_must_stay(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GuilomoError, match=f"out holds a comparison with other settings .*{said}"):
        claim(**changes)


def test_a_folder_is_not_continued_unasked() -> None:
    with pytest.raises(GuilomoError, match=r"already holds this comparison.*--resume"):
        claim(resume=False)
