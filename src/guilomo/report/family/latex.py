"""The comparison as a LaTeX table in the style of booktabs."""

from __future__ import annotations

from collections.abc import Sequence

from guilomo.report.family.against import against
from guilomo.report.family.reading import (
    Comparison,
    Result,
    Task,
    ordered_methods,
    reference_label,
    result_of,
    tasks_of,
)
from guilomo.report.family.rows import span_text
from guilomo.report.reading import Method, label_of
from guilomo.report.units import DASH, MINUS, THIN, count, number, plain, title_of

_ESCAPES = {
    "\\": r"\textbackslash{}",
    **{sign: "\\" + sign for sign in "{}$&#_%"},
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    DASH: "--",
    MINUS: "$-$",
    THIN: r"\,",
    "×": r"$\times$",
    "±": r"$\pm$",
    "▽": r"$\bigtriangledown$",
    "α": r"$\alpha$",
    "β": r"$\beta$",
    "\n": " ",
}


def escaped(text: str) -> str:
    """The text with every sign that LaTeX would read as a command spelled out; other letters stay as they are."""
    return "".join(_ESCAPES.get(letter, letter) for letter in text)


def methods_tex(compare: Comparison) -> str:
    """One row per method, lowest mean rank first: mean with interval per task, rank, parameters, step time.

    The best mean of every task and the best mean rank are bold. A star marks a difference to the reference beyond
    noise, a dagger a method that is not done with all seeds.
    """
    tasks = tasks_of(compare)
    lines = [
        "% Needs \\usepackage{booktabs}.",
        "\\begin{tabular}{l" + "r" * (len(tasks) + 3) + "}",
        "\\toprule",
        " & ".join(["Method", *map(_heading, tasks), "Mean rank", "Parameters", "Step time"]) + r" \\",
        "\\midrule",
        *(_row(compare, method, tasks) for method in ordered_methods(compare)),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines + _notes(compare)) + "\n"


def _heading(task: Task) -> str:
    unit = ", %" if task.unit.suffix else ""
    return escaped(f"{task.name} ({title_of(task.metric).lower()}{unit})")


def _row(compare: Comparison, method: Method, tasks: Sequence[Task]) -> str:
    results = [result_of(compare, method, task) for task in tasks]
    steps = (result.step.middle if result.step else None for result in results)
    cells = [
        escaped(label_of(method)),
        *(_cell(compare, method, task) for task in tasks),
        _bold(escaped(plain(method.get("mean_rank"))), _best_rank(compare, method)),
        escaped(span_text((result.parameters for result in results), count)),
        escaped(span_text(steps, plain, "×")),
    ]
    return " & ".join(cells) + r" \\"


def _cell(compare: Comparison, method: Method, task: Task) -> str:
    """The mean and its interval, with the marks for what the tests say and for seeds that are not done."""
    result, test = result_of(compare, method, task), against(compare, method, task)
    dagger = r"$^{\dagger}$" if result.failed or result.missing else ""
    if result.mean is None:
        return "--" + dagger
    star = "$^{*}$" if test and test.outcome in ("better", "worse") else ""
    value = _bold(escaped(task.unit.bare(result.mean)), result.mean == _best(compare, task))
    interval = ", ".join(escaped(task.unit.bare(end)) for end in result.bounds or ())
    return value + star + dagger + (f" [{interval}]" if interval else "")


def _best(compare: Comparison, task: Task) -> float | None:
    """The best mean on a task; a method that is not done with all seeds does not compete."""
    means = [result.mean for result in _finished(compare, task) if result.mean is not None]
    return (max if task.higher else min)(means, default=None)


def _finished(compare: Comparison, task: Task) -> list[Result]:
    found = [result_of(compare, method, task) for method in ordered_methods(compare)]
    return [result for result in found if not result.failed and not result.missing]


def _best_rank(compare: Comparison, method: Method) -> bool:
    ranks = [number(other.get("mean_rank")) for other in ordered_methods(compare)]
    own, known = number(method.get("mean_rank")), [rank for rank in ranks if rank is not None]
    return own is not None and own == min(known)


def _bold(text: str, best: bool) -> str:
    return rf"\textbf{{{text}}}" if best else text


def _notes(compare: Comparison) -> list[str]:
    """What the marks mean, as comments to take into the caption."""
    name = escaped(reference_label(compare))
    return [
        f"% Brackets: the interval of the mean. Step time: multiple of that of {name}.",
        f"% *: differs from {name} beyond noise, p-values corrected for all tests. Bold: best of its column.",
        "% $\\dagger$: not done with all seeds; not in the competition for bold.",
    ]
