"""What the page of a comparison says in words: what it is about, what is left out, how equal it is, how it was made."""

from __future__ import annotations

from typing import Any

from guilomo.report.facts import hardware_text, model_text, moment, plural
from guilomo.report.family.ranks import critical_of, groups_of, ranked
from guilomo.report.family.reading import (
    Comparison,
    Task,
    alpha_of,
    ordered_methods,
    result_of,
    seeds_of,
    tasks_of,
)
from guilomo.report.reading import label_of, methods_of, part
from guilomo.report.units import count, number, p_value, plain, share

#: Sizes further than this from the budget are named.
_NEAR = 0.05


def facts_of(compare: Comparison) -> list[str]:
    """The line under the title: model, tasks, effort."""
    model = part(compare, "model")
    facts = [str(model["name"])] if model.get("name") else []
    facts += [", ".join(task.name for task in tasks_of(compare))] if tasks_of(compare) else []
    methods, seeds = methods_of(compare), seeds_of(compare)
    if methods:
        facts.append(plural(len(methods), "method") + f" × {plural(len(seeds), 'seed')}")
    return facts


def left_out(compare: Comparison) -> list[tuple[str, str]]:
    """The tasks that are no part of the verdict, each with the reason."""
    reason = "the reference does no better than guessing there"
    return [(task.name, task.note or reason) for task in tasks_of(compare) if not task.counted]


def undone(compare: Comparison) -> str:
    """How many trainings are missing; empty if none is."""
    results = [result_of(compare, method, task) for method in methods_of(compare) for task in tasks_of(compare)]
    failed, missing = sum(result.failed for result in results), sum(result.missing for result in results)
    whole = sum(len(result.cells) for result in results)
    parts = [
        f"{count(failed)} failed" if failed else "",
        f"{count(missing)} {'is' if missing == 1 else 'are'} missing" if missing else "",
    ]
    words = " and ".join(filter(None, parts))
    return f"Of {count(whole)} trainings, {words}." if words else ""


def budget_notes(compare: Comparison) -> list[str]:
    """Per task, whether the methods have the size they were meant to have, and which have not."""
    return [note for task in tasks_of(compare) if (note := _budget_note(compare, task))]


def _budget_note(compare: Comparison, task: Task) -> str:
    budget = number(task.source.get("budget"))
    found = [(label_of(method), result_of(compare, method, task).parameters) for method in ordered_methods(compare)]
    known = [(label, size) for label, size in found if size is not None]
    if not known or not budget:
        return ""
    sizes = [size for _, size in known]
    span = " to ".join(dict.fromkeys([count(min(sizes)), count(max(sizes))]))
    far = [f"{label} ({count(size)})" for label, size in known if abs(size - budget) > _NEAR * budget]
    tail = f" Further than {share(_NEAR)} from it: {', '.join(far)}." if far else ""
    return f"{task.name}: budget {count(budget)} trainable parameters, methods have {span}.{tail}"


def rank_facts(compare: Comparison) -> dict[str, Any]:
    """How to read the mean ranks."""
    friedman = part(compare, "friedman")
    p, entries, critical = number(friedman.get("p")), ranked(compare), critical_of(compare)
    groups = groups_of([rank for _, rank in entries], critical) if critical is not None else []
    names = {method.get("name") for method, _ in entries}
    unranked = [label_of(method) for method in ordered_methods(compare) if method.get("name") not in names]
    return {
        "made": critical is not None,
        "p": p_value(p),
        "differ": p is not None and p < alpha_of(compare),
        "known": p is not None,
        "own": bool(part(friedman, "mean_ranks")),
        "alpha": share(alpha_of(compare)),
        "critical": plain(critical),
        "blocks": count(friedman.get("n_blocks")),
        "of": friedman.get("blocks") or "blocks",
        "single": any(first == 0 and last == len(entries) - 1 for first, last in groups),
        "unranked": ", ".join(unranked),
    }


def made_of(compare: Comparison) -> list[tuple[str, str]]:
    """How the comparison was made: what is needed to repeat it."""
    pairs = {
        "Made": moment(compare.get("created")),
        "guilomo": compare.get("guilomo"),
        "Versions": ", ".join(f"{name} {version}" for name, version in part(compare, "versions").items()),
        "Hardware": hardware_text(part(compare, "hardware")),
        "Seeds": ", ".join(map(str, seeds_of(compare))),
        "Model": model_text(part(compare, "model")),
    }
    return [(name, str(value) if value else "not recorded") for name, value in pairs.items()]
