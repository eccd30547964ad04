"""Where the parameters went and which experts are used, by the pictures that the page of a run has for one method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from guilomo.allocation.plan import Allocation
from guilomo.report.family.labels import cut
from guilomo.report.family.reading import Comparison, Task, is_reference, ordered_methods, tasks_of
from guilomo.report.reading import Method, label_of, part

#: Letters that fit over a small picture.
_LETTERS = 23

Owner = tuple[Method, str]


@dataclass(frozen=True)
class Plan:
    """An allocation and everyone who was trained with it.

    Attributes:
        owners: the methods, each with the task where that method has another plan on another task.
        allocation: the plan.
    """

    owners: tuple[Owner, ...]
    allocation: Allocation

    @property
    def label(self) -> str:
        """The first owner, short enough to stand over a small picture."""
        method, task = self.owners[0]
        task = cut(task, 12)
        room = _LETTERS - 2 - len(task) if task else _LETTERS
        label = label_of(method) if len(label_of(method)) <= room else str(method.get("name") or label_of(method))
        return cut(label, room) + (f", {task}" if task else "")

    @property
    def names(self) -> list[str]:
        """All owners in full."""
        return [label_of(method) + (f" on {task}" if task else "") for method, task in self.owners]


def plans_of(compare: Comparison) -> list[Plan]:
    """The distinct allocations, the reference's first, then in the order of the methods; equal ones are shown once."""
    owners: list[tuple[Allocation, list[Owner]]] = []
    for method in sorted(ordered_methods(compare), key=lambda method: not is_reference(compare, method)):
        for owner, allocation in _owned(compare, method):
            same = next((names for plan, names in owners if plan.modules == allocation.modules), None)
            if same is None:
                owners.append((allocation, [owner]))
            else:
                same.append(owner)
    return [Plan(tuple(names), plan) for plan, names in owners]


def _owned(compare: Comparison, method: Method) -> list[tuple[Owner, Allocation]]:
    """The plans of a method: one if it has the same on all tasks, else one per task with the task's name."""
    stored = {task.name: part(method, "tasks", task.name, "allocation") for task in tasks_of(compare)}
    plans = {name: Allocation.from_dict(entry) for name, entry in stored.items() if entry}
    found = list(plans.items())
    if all(plan.modules == found[0][1].modules for _, plan in found):
        return [((method, ""), plan) for _, plan in found[:1]]
    return [((method, name), plan) for name, plan in found]


def routed(compare: Comparison) -> list[Method]:
    """The methods with routers, as the page of a run knows them: one run per task, the first seed's."""
    found: list[Method] = []
    for method in ordered_methods(compare):
        routers = [part(method, "tasks", task.name, "router") for task in tasks_of(compare)]
        runs: list[dict[str, Any]] = [{"router": router} for router in routers if router]
        if runs:
            found.append({"name": method.get("name"), "label": label_of(method), "runs": runs})
    return found


def loads_of(compare: Comparison) -> tuple[Task, list[Method]] | None:
    """The first task on which routers were recorded, and its methods with their load and their plan."""
    for task in tasks_of(compare):
        found: list[Method] = []
        for method in ordered_methods(compare):
            entry = part(method, "tasks", task.name)
            if part(entry, "router").get("load"):
                runs = [{"router": entry["router"]}]
                plan = entry.get("allocation")
                found.append({"name": method.get("name"), "label": label_of(method), "runs": runs, "allocation": plan})
        if found:
            return task, found
    return None
