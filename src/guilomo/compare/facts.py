"""What is known of a task before any training: its data, the model's size, the budget, and what chance would score.

tasks/TASK/facts.json
"""

from __future__ import annotations

from typing import Any

from guilomo.compare.work import Worker
from guilomo.evaluation import chance_of
from guilomo.run.compare import data_facts
from guilomo.run.files import read_json, write_json


def facts_of(worker: Worker, task: str) -> dict[str, Any]:
    """The facts of a task; looked up once, with the reference's run, and kept in its folder.

    Raises:
        GuilomoError: data, model and budget do not fit together.
    """
    path = worker.board.runs[task].folder / "facts.json"
    if path.exists():
        found: dict[str, Any] = read_json(path)
        return found
    job = worker.job(task, worker.board.config.reference.name)
    found = {
        "data": {**data_facts(job), "name": task},
        "chance": chance_of(job.task),
        "budget": job.facts["budget"],
        "budget_source": job.facts["budget_source"],
        "model_parameters": job.facts["parameters"],
    }
    write_json(path, found)
    return found


def check_data(worker: Worker, task: str) -> None:
    """Refuses rows that are not those the comparison began with, on this machine or another.

    Raises:
        GuilomoError: the data have changed, or are others here.
    """
    folder = worker.board.runs[task].folder
    known = read_json(folder / "facts.json")["data"]["hash"]
    worker.job(task, worker.board.config.reference.name).refuse_other_data({"data_hash": known}, folder)
