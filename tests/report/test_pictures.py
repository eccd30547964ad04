"""Pictures and terminal tables: the right marks, readable names, no side effects."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import synthetic_results as synthetic
from matplotlib import image
from matplotlib.figure import Figure
from rich.console import Console

from guilomo.allocation.plan import Allocation, ModulePlan
from guilomo.errors import GuilomoError
from guilomo.report import (
    allocation_table,
    comparison_table,
    plot_allocation,
    plot_comparison,
    plot_headline,
    plot_losses,
    plot_router_load,
    plot_trajectories,
    save_figure,
)
from guilomo.report.curves import binned, mean_curve, picked, spread
from guilomo.report.grid import grid_of, short_names
from guilomo.report.heatmap import rank_detail
from guilomo.report.units import MINUS, THIN, compact, duration, p_value, unit_of


def texts(figure: Figure) -> list[str]:
    """Every text in a figure."""
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [t.get_text() for t in figure.texts]


def shown(table: Any) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_heat_map_shows_mixed_ranks_and_leaves_unadapted_modules_hatched() -> None:
    modules = {
        "layer.0.query": ModulePlan(8, 8, (4, 4, 2)),
        "layer.0.key": ModulePlan(8, 8, ()),
        "layer.1.query": ModulePlan(8, 8, (3, 3)),
    }
    figure = plot_allocation(Allocation(modules), "rank")
    assert {"10", "4+4+2", "6", "2×3", "query", "key"} <= set(texts(figure))
    hatches = [patch.get_hatch() for patch in figure.axes[0].patches]
    assert len(hatches) == 3
    assert sum(hatch is not None for hatch in hatches) == 1


def test_heat_map_draws_into_given_axes() -> None:
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    assert plot_allocation(synthetic.plan("uniform"), "experts", ax=axes) is figure
    assert len(axes.patches) == 36


def test_unknown_quantity_is_named() -> None:
    with pytest.raises(GuilomoError, match="Did you mean 'rank'"):
        plot_allocation(synthetic.plan("uniform"), "ranks")


def test_rank_detail() -> None:
    details = [rank_detail(ModulePlan(8, 8, ranks, 1)) for ranks in ((), (4,), (2, 4), (8, 2, 4, 4))]
    assert details == ["", "1×4", "4+2", "4×2–8"]


def test_comparison_has_a_dot_per_method_and_seed() -> None:
    axes = plot_comparison(synthetic.results()).axes[0]
    marks = [len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]  # type: ignore[arg-type]
    assert marks == [2, 1] * 5


def test_pictures_of_empty_results_say_so() -> None:
    for figure in (plot_comparison({}), plot_losses({}), plot_trajectories({}), plot_router_load([])):
        assert any(text.startswith(("No ", "The search recorded no")) for text in texts(figure))
    assert "No allocation yet" in texts(plot_headline({}))


def test_dead_experts_are_flagged() -> None:
    name = "layer.0.query"
    router = {"load": {name: [0.6, 0.4, 0.0, 0.0]}, "entropy": {name: 0.48}, "dead": {name: 2}}
    assert "×2" in texts(plot_router_load([{"name": "a", "runs": [{"seed": 0, "router": router}]}]))


def test_headline_claims_equal_budget_only_if_sizes_agree() -> None:
    results = synthetic.results()
    assert "Accuracy" in texts(plot_headline(results))
    for method in results["methods"]:
        method["parameters"] = 228_096
    assert "Accuracy at equal budget" in texts(plot_headline(results))


def test_saving_is_opaque_and_leaves_matplotlib_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    path = save_figure(plot_allocation(synthetic.plan("uniform")), tmp_path / "new" / "map.png")
    assert image.imread(path)[0, 0, 3] == 1.0
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(GuilomoError, match=r"\.png, \.svg, \.pdf"):
        save_figure(Figure(), tmp_path / "map.bmp")


def test_short_names_stay_distinct() -> None:
    names = [name for name, _, _ in synthetic.MINILM]
    expected = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
    assert short_names(names) == expected


def test_grid_orders_layers_by_number_and_tells_stacks_apart() -> None:
    grid = grid_of(["encoder.layer.10.q", "encoder.layer.2.q", "decoder.layer.0.q", "head"])
    assert grid.rows == ("e2", "e10", "d0", "–")
    assert grid.places["encoder.layer.2.q"] == (0, 0)


def test_curves() -> None:
    curve = ([float(i) for i in range(100)], [2.0 * i for i in range(100)])
    assert binned(curve, 10)[0][0] == 4.5
    assert len(binned(curve, 7)[0]) == 7
    assert picked(curve, 5)[0][0] == 0.0
    assert picked(curve, 5)[0][-1] == 99.0
    assert mean_curve([[[0, 1.0], [1, float("nan")]], [[0, 3.0], [1, 4.0]]]) == ([0.0, 1.0], [2.0, 4.0])
    assert spread([1.0, 1.0], 2.0) == [0.0, 2.0]


def test_units() -> None:
    assert unit_of("accuracy").show(0.8745) == f"87.5{THIN}%"
    assert unit_of("accuracy").difference(-0.0062) == f"{MINUS}0.6{THIN}pp"
    assert unit_of("loss").difference(-0.0001) == "+0.000"
    assert [compact(n) for n in (0, 768, 999_950, 1_240_000, None)] == ["0", "768", "1.00M", "1.24M", "–"]
    assert duration(492) == f"8{THIN}min 12{THIN}s"
    assert duration(7500) == f"2{THIN}h 05{THIN}min"
    assert [p_value(p) for p in (1e-9, 0.0312, 0.5, None)] == ["< 0.001", "0.031", "0.50", "–"]


def test_terminal_tables() -> None:
    results = synthetic.results()
    results["methods"][0]["label"] = "[red]odd[/red]"
    text = shown(comparison_table(results))
    assert "[red]odd[/red]" in text
    assert "[86.1, 89.0]" in text
    assert "1.00×" in text
    assert "472,320" in shown(allocation_table(synthetic.plan("guilomo")))
    assert "run" in shown(comparison_table({}))
