"""What the tests say about a method against the reference: better, worse, or not told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guilomo.report.family.reading import Comparison, Task, alpha_of
from guilomo.report.palette import ACCENT, QUIET, WARN
from guilomo.report.reading import Method
from guilomo.report.units import Unit, lower_is_better, number, unit_of

#: The colour of each outcome, in every picture of the page.
COLOURS = {"better": ACCENT, "worse": WARN, "even": QUIET}


@dataclass(frozen=True)
class Against:
    """One test of a method against the reference.

    Attributes:
        metric: what was tested; mostly the task's own metric.
        difference, low, high: method minus reference with its interval.
        p, corrected: the p-value, and the one after the correction for all tests.
        outcome: `better` or `worse` beyond noise, `even` if neither, empty if there is no corrected p-value.
        test: the name of the test.
    """

    metric: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    corrected: float | None
    outcome: str
    test: str

    @property
    def unit(self) -> Unit:
        """How the difference is written."""
        return unit_of(self.metric)

    @property
    def colour(self) -> str:
        """How the outcome is drawn; no outcome looks like no difference."""
        return COLOURS.get(self.outcome, QUIET)


def tested_metric(compare: Comparison, task: Task) -> str:
    """The metric of a task's tests: its own, or the first that was tested in its place."""
    found = [str(test.get("metric") or "") for test in compare.get("tests") or [] if test.get("task") == task.name]
    return task.metric if task.metric in found or not found else found[0]


def against(compare: Comparison, method: Method, task: Task) -> Against | None:
    """The test of a method on a task; None if none was made."""
    wanted = (task.name, method.get("name"), tested_metric(compare, task))
    for test in compare.get("tests") or []:
        difference = number(test.get("difference"))
        if (test.get("task"), test.get("method"), test.get("metric")) == wanted and difference is not None:
            return _against(compare, task, test, difference)
    return None


def _against(compare: Comparison, task: Task, test: Mapping[str, Any], difference: float) -> Against:
    corrected, metric = number(test.get("p_corrected")), str(test.get("metric") or "")
    higher = task.higher if metric == task.metric else not lower_is_better(metric)
    return Against(
        metric=metric,
        difference=difference,
        low=number(test.get("low")),
        high=number(test.get("high")),
        p=number(test.get("p")),
        corrected=corrected,
        outcome=_outcome(difference, corrected, higher, alpha_of(compare)),
        test=str(test.get("test") or ""),
    )


def _outcome(difference: float, corrected: float | None, higher: bool, alpha: float) -> str:
    """Only a corrected p-value below the level makes a difference more than noise."""
    if corrected is None:
        return ""
    if corrected >= alpha or difference == 0:
        return "even"
    return "better" if (difference > 0) == higher else "worse"
