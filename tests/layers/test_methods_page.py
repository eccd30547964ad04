"""docs/methods.md names every router, every balance form, and every option with its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from guilomo.layers import BALANCE_FORMS, ROUTERS
from guilomo.layers.options import defaults_of

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` \|.*$", PAGE, re.MULTILINE)}


@pytest.mark.parametrize(("name", "made_by"), [*ROUTERS.items(), *BALANCE_FORMS.items()])
def test_every_name_and_option_is_there(name: str, made_by: Any) -> None:
    row = ROWS[name]
    for option, default in defaults_of(made_by).items():
        said = re.search(rf"`{option}` \(([^)]+)\)", row)
        assert said, option
        if default is not None:
            shown = {True: "true", False: "false"}[default] if isinstance(default, bool) else default
            assert said[1] == str(shown) or float(said[1]) == float(shown)


def test_nothing_else_is_named() -> None:
    assert set(ROWS) == {*ROUTERS, *BALANCE_FORMS}
