"""The pictures of a comparison: what is joined, what is marked, and that no two names touch."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import synthetic_compare as synthetic
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from guilomo.errors import GuilomoError
from guilomo.report.canvas import NARROW, WIDE
from guilomo.report.family import plot_costs, plot_differences, plot_ranks, plot_sweeps
from guilomo.report.family.labels import cut, fitted, separated
from guilomo.report.family.plans import loads_of, plans_of, routed
from guilomo.report.family.ranks import groups_of, lanes_of
from guilomo.report.palette import INK, WARN


def small(**changes: Any) -> dict[str, Any]:
    return synthetic.comparison(methods=4, tasks=2, seeds=2, **changes)


def boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text in a figure with the place it takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown: list[Text] = list(figure.texts)
    for axes in figure.axes:
        shown += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    found = [text for text in shown if text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in found]  # type: ignore[attr-defined]


def test_groups_join_exactly_what_is_closer_than_the_critical_difference() -> None:
    ranks = [1.0, 2.0, 2.4, 4.5, 4.9, 6.0, 9.0]
    for critical in (0.1, 0.41, 1.0, 1.1, 2.1, 2.6, 5.0, 9.0):
        groups = groups_of(ranks, critical)
        joined = {pair for first, last in groups for pair in combinations(range(first, last + 1), 2)}
        assert joined == {(i, j) for i, j in combinations(range(7), 2) if ranks[j] - ranks[i] < critical}
        assert not any(a != b and a[0] >= b[0] and a[1] <= b[1] for a in groups for b in groups)


def test_a_difference_equal_to_the_critical_one_is_a_difference() -> None:
    assert groups_of([1.0, 2.0], 1.0) == []
    assert groups_of([1.0, 1.0], 0.0) == []
    assert groups_of([1.0, 1.0], 0.1) == [(0, 1)]
    assert groups_of([], 1.0) == []


def test_groups_that_overlap_have_lanes_of_their_own() -> None:
    groups = [(0, 2), (1, 3), (3, 5), (4, 6)]
    lanes = lanes_of(groups)
    assert lanes == [0, 1, 0, 1]
    for (a, lane), (b, other) in combinations(zip(groups, lanes, strict=True), 2):
        assert lane != other or a[1] < b[0] or b[1] < a[0]


def lines(axes: Axes, name: str) -> list[tuple[Any, Any]]:
    return [line.get_data() for line in axes.lines if line.get_gid() == name]


def test_rank_diagram_draws_the_groups_and_the_ruler() -> None:
    compare = synthetic.comparison(methods=6, tasks=3, seeds=2)
    ranks = sorted(compare["friedman"]["mean_ranks"].values())
    critical = compare["friedman"]["critical_difference"]
    axes = plot_ranks(compare).axes[0]
    spans = [(round(y[0] - 0.3), round(y[1] - 0.7)) for _, y in lines(axes, "group")]
    assert spans == groups_of(ranks, critical)
    ((ruler, _),) = lines(axes, "critical")
    assert ruler[1] - ruler[0] == pytest.approx(critical)
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]  # type: ignore[index]
    assert dots == ranks


def test_rank_diagram_falls_back_on_the_ranks_over_tasks() -> None:
    compare = small()
    del compare["friedman"]["mean_ranks"]
    axes = plot_ranks(compare).axes[0]
    dots = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]  # type: ignore[index]
    assert dots == sorted(method["mean_rank"] for method in compare["methods"])


def test_rank_diagram_without_a_critical_difference() -> None:
    axes = plot_ranks(small(friedman=None)).axes[0]
    assert lines(axes, "group") == lines(axes, "critical") == []


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(
    "draw",
    [
        plot_differences,
        lambda compare, width: plot_differences(compare, "loss", width),
        plot_ranks,
        plot_sweeps,
        lambda compare, width: plot_costs(compare, "parameters", width),
        lambda compare, width: plot_costs(compare, "step", width),
    ],
)
def test_names_do_not_touch_with_twenty_methods_and_four_tasks(draw: Any, width: float) -> None:
    figure = draw(synthetic.comparison(), width=width)
    found = boxes(figure)
    for (one, a), (other, b) in combinations(found, 2):
        # A hair of overlap is the leading of a line, not ink.
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        along = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 1 or along < 3, (one, other)
    for text, box in found:
        assert box.x0 > -1, text
        assert box.x1 < width + 1, text


def test_differences_mark_what_is_beyond_noise_and_excuse_the_rest() -> None:
    compare = small()
    synthetic.fail(compare, "dora", "mrpc", [0, 1])
    figure = plot_differences(compare)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["failed"]
    filled = [line for axes in figure.axes for line in axes.lines if line.get_marker() == "o"]
    decided = [line for line in filled if line.get_markerfacecolor() == line.get_markeredgecolor()]
    own = [test for test in compare["tests"] if test["metric"] == "accuracy"]
    assert len(filled) == len(own)
    assert len(decided) == sum(test["p_corrected"] < 0.05 for test in own)
    assert 0 < len(decided) < len(own)


def test_costs_draw_the_reference_as_a_line_and_a_band() -> None:
    compare = small()
    axes = plot_costs(compare, "parameters").axes[0]
    entry = compare["methods"][0]["tasks"]["sst2"]
    flat = [line for line in axes.lines if list(line.get_xdata()) == [0, 1] and to_hex(line.get_color()) == INK]  # type: ignore[arg-type]
    assert [line.get_ydata()[0] for line in flat] == [entry["mean"]]  # type: ignore[index]
    (band,) = axes.patches
    box = band.get_extents().transformed(axes.transData.inverted())
    assert (box.y0, box.y1) == pytest.approx((entry["low"], entry["high"]))
    dots = [line.get_data() for line in axes.lines if line.get_marker() == "o"]
    order = sorted(compare["methods"], key=lambda method: method["mean_rank"])
    expected = [(m["tasks"]["sst2"]["parameters"], m["tasks"]["sst2"]["mean"]) for m in order]
    assert [(x[0], y[0]) for x, y in dots] == expected
    steps = [list(line.get_xdata()) for line in plot_costs(compare, "step").axes[0].lines if line.get_alpha()]
    for method in order:
        ratio = method["tasks"]["sst2"]["step_time_ratio"]
        assert [ratio["low"], ratio["high"]] in steps
    with pytest.raises(GuilomoError, match="Did you mean 'step'"):
        plot_costs(compare, "steps")


def test_sweeps_fill_the_chosen_rate_and_warn_at_the_edge() -> None:
    compare = synthetic.comparison(methods=6, tasks=1)
    sweeps = [method["tasks"]["sst2"]["sweep"] for method in compare["methods"]]
    axes = plot_sweeps(compare).axes[0]
    chosen = [patch for patch in axes.patches if patch.get_gid() == "chosen"]
    assert len(chosen) == 6
    warned = [patch for patch in chosen if to_hex(patch.get_facecolor()) == WARN]
    assert len(warned) == sum(sweep["edge"] for sweep in sweeps)
    assert 0 < len(warned) < 6
    diverged = sum(one["loss"] is None for sweep in sweeps for one in sweep["rates"])
    assert sum(text.get_text() == "×" for text in axes.texts) == diverged


def test_equal_plans_are_shown_once_and_searched_ones_per_task() -> None:
    plans = plans_of(synthetic.comparison(methods=7, tasks=2))
    found = {plan.names[0]: plan.names[1:] for plan in plans}
    assert {"GuiLoMo (searched) on sst2", "GuiLoMo (searched) on mrpc", "MoLA ▽ (2-4-6-8)"} < set(found)
    assert len(plans) == 4
    assert sorted(map(len, found.values())) == [0, 0, 0, 4]
    assert all(len(plan.label) <= 23 for plan in plans)


def test_routers_of_all_tasks_and_loads_of_the_first() -> None:
    compare = synthetic.comparison(methods=7, tasks=2)
    assert [len(method["runs"]) for method in routed(compare)] == [2, 2]
    compare["methods"][1]["tasks"]["sst2"]["router"] = compare["methods"][6]["tasks"]["sst2"]["router"] = None
    found = loads_of(compare)
    assert found is not None
    assert found[0].name == "mrpc"
    assert loads_of(small() | {"methods": []}) is None


def test_separated_heights() -> None:
    assert separated([], 2, 0, 10) == []
    assert separated([1.0, 5.0, 9.0], 2, 0, 10) == [1.0, 5.0, 9.0]
    assert separated([5.0, 5.0], 2, 0, 10) == [4.0, 6.0]
    assert separated([0.0, 0.0, 0.0], 2, 0, 10) == [0.0, 2.0, 4.0]
    assert separated([10.0, 9.9], 2, 0, 10) == [10.0, 8.0]
    crowd = separated([3.0, 3.1, 8.0, 3.05, 2.9], 1.0, 0, 10)
    assert all(b - a >= 1 - 1e-9 for a, b in pairwise(sorted(crowd)))
    assert sorted(range(5), key=crowd.__getitem__) == [4, 0, 3, 1, 2]


def test_labels_fit_their_place() -> None:
    method = {"name": "shuffled", "label": "searched, shuffled among equal shapes"}
    assert fitted(method, 400, 12) == method["label"]
    assert fitted(method, 100, 12) == "shuffled"
    assert fitted(method, 40, 12) == "shuf…"
    assert cut("abc", 3) == "abc"
