"""What the cells of a world say together: means and differences over seeds, with Student's intervals, and the goals."""

from __future__ import annotations

from typing import Any

from guilomo.evaluation import Score, t_interval

Cell = dict[str, Any]
LEAST = {"ranks": 0.9, "experts": 0.8}
"""Mean Spearman correlation that the default search is to reach, by what it is free to choose."""
NOTHING = 0.3
"""Mean correlations up to this size count as none."""
CONTROLS = ("uniform", "random")


def summarise(cells: list[Cell]) -> dict[str, Any]:
    """Of the cells of one world. A plan that is the same everywhere agrees with nothing and counts as 0."""
    searches = list(cells[0]["searches"])
    spearman = {name: _over(cell["searches"][name]["spearman"] or 0.0 for cell in cells) for name in searches}
    spearman["random"] = _over(cell["random"]["spearman"] for cell in cells)
    losses = {name: _over(cell["losses"][name] for cell in cells) for name in cells[0]["losses"]}
    minus = {
        name: {control: _over(cell["losses"][name] - cell["losses"][control] for cell in cells) for control in CONTROLS}
        for name in searches
    }
    axis = "experts" if cells[0]["options"]["searches"][searches[0]]["max_experts"] > 1 else "ranks"
    return {
        "axis": axis,
        "seeds": [cell["seed"] for cell in cells],
        "spearman": _written(spearman),
        "test_loss": _written(losses),
        "test_loss_minus": {name: _written(scores) for name, scores in minus.items()},
        "goals": _goals(axis, spearman, minus),
    }


def _over(values: Any) -> Score:
    return t_interval(list(values))


def _written(scores: dict[str, Score]) -> dict[str, Any]:
    return {name: score.to_dict() for name, score in scores.items()}


def _goals(axis: str, spearman: dict[str, Score], minus: dict[str, dict[str, Score]]) -> dict[str, bool]:
    """By sentence, of the searches that ran. With one seed nothing lies beyond the interval, which is unknown."""
    goals = {}
    if "guilomo" in spearman:
        goals[f"guilomo finds the {axis} (mean Spearman >= {LEAST[axis]})"] = spearman["guilomo"].value >= LEAST[axis]
        for control, score in minus["guilomo"].items():
            goals[f"guilomo's test loss is below that of {control} plans beyond the interval"] = score.high < 0
    for name in ("random", "authors_code"):
        if name in spearman:
            goals[f"{name} finds nothing (|mean Spearman| <= {NOTHING})"] = abs(spearman[name].value) <= NOTHING
    return {goal: bool(met) for goal, met in goals.items()}
