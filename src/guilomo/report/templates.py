"""The pages' templates, which lie beside this file."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def filled(template: str, context: dict[str, Any]) -> str:
    """A page as HTML text; values are escaped, and one that the template does not find is an error."""
    environment = Environment(
        loader=PackageLoader("guilomo.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)
