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


def metrics_tested(compare: Comparison, task: Task) -> list[str]:
    """The metrics of a task's tests, the one that stands for the task's own first.

    That is its own if it was tested, else the first with the same better side: loss for perplexity, accuracy for a
    correlation. Without any test it is its own.
    """
    tests = [test for test in compare.get("tests") or [] if test.get("task") == task.name]
    found = list(dict.fromkeys(str(test.get("metric") or "") for test in tests)) or [task.metric]
    return sorted(found, key=lambda metric: (metric != task.metric, higher_on(task, metric) != task.higher))


def higher_on(task: Task, metric: str) -> bool:
    """Whether a larger value of a metric is the better one on a task."""
    return task.higher if metric == task.metric else not lower_is_better(metric)


def against(compare: Comparison, method: Method, task: Task, metric: str | None = None) -> Against | None:
    """The test of a method on a task; None if none was made.

    Args:
        compare: the parsed compare.json.
        method: not the reference.
        task: where.
        metric: in what; default: the first of `metrics_tested`.
    """
    wanted = (task.name, method.get("name"), metric or metrics_tested(compare, task)[0])
    for test in compare.get("tests") or []:
        difference = number(test.get("difference"))
        if (test.get("task"), test.get("method"), test.get("metric")) == wanted and difference is not None:
            return _against(compare, task, test, difference)
    return None


def _against(compare: Comparison, task: Task, test: Mapping[str, Any], difference: float) -> Against:
    corrected, metric = number(test.get("p_corrected")), str(test.get("metric") or "")
    return Against(
        metric=metric,
        difference=difference,
        low=number(test.get("low")),
        high=number(test.get("high")),
        p=number(test.get("p")),
        corrected=corrected,
        outcome=_outcome(difference, corrected, higher_on(task, metric), alpha_of(compare)),
        test=str(test.get("test") or ""),
    )


def _outcome(difference: float, corrected: float | None, higher: bool, alpha: float) -> str:
    """Only a corrected p-value below the level makes a difference more than noise."""
    if corrected is None:
        return ""
    if corrected >= alpha or difference == 0:
        return "even"
    return "better" if (difference > 0) == higher else "worse"
