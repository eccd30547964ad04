"""A comparison: every method on every task with every seed, as one validated object."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from guilomo.run.config import (
    PLAIN_LORA,
    RATES,
    BudgetConfig,
    EvaluationConfig,
    MethodConfig,
    MixtureConfig,
    ModelConfig,
    RunConfig,
    SweepConfig,
    share_top_k,
)
from guilomo.run.recipe import problems
from guilomo.search import SearchConfig
from guilomo.tasks import TaskConfig, task_from
from guilomo.training import TrainConfig

OWN_KEYS = {"name", "file", "train", "budget", "evaluation"}
"""What a task of a comparison has beyond `TaskConfig`, or in another sense."""


class ComparedTask(TaskConfig):
    """A task of the comparison, and what is different for it."""

    # A base class's own description would be that of a run's task.
    name: str = Field(description="Name of the task in the comparison and of its folder, unique.")
    file: str | None = Field(None, description="Name of its files in a folder, where that is not the name.")
    train: dict[str, Any] = Field(default_factory=dict, description="Keys of train that differ for this task.")
    budget: dict[str, Any] = Field(default_factory=dict, description="Keys of budget that differ for this task.")
    evaluation: dict[str, Any] = Field(default_factory=dict, description="Keys of evaluation that differ for it.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return task_from(value) if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"name = {name!r} is not usable: expected letters, digits, '.', '_', '+' and '-'.")
        return name

    def task(self) -> TaskConfig:
        """The task alone, as a run takes it."""
        fields = {name: getattr(self, name) for name in self.model_fields_set - OWN_KEYS}
        return TaskConfig(**fields, name=self.file or self.name)


class CompareConfig(BaseModel):
    """What `guilomo compare` reads. Everything but the tasks means what it means in a recipe."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("comparison", description="Title of the comparison.")
    output: str = Field("", description="Folder for everything it writes; unset: comparisons/<name>.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    tasks: list[ComparedTask] = Field(
        min_length=1,
        description="Each with the keys of a recipe's task, a name, and if wished its own train, budget and evaluation "
        "keys; or one word: docstrings, a data file, FOLDER/NAME, hub:OWNER/DATASET, or several such joined by +.",
    )
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    train: TrainConfig = Field(default_factory=lambda: TrainConfig(use_held_out=False))
    sweep: SweepConfig = Field(default_factory=lambda: SweepConfig(learning_rates=RATES))
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    methods: list[MethodConfig] = Field(
        min_length=1, description="Rows of the comparison. Plain LoRA is added if it is not among them."
    )
    seeds: list[int] = Field(
        default=[0, 1, 2], min_length=1, description="One training per task, method and seed. Fewer than 3 say little."
    )
    search_per_seed: bool = Field(False, description="A search of its own for every training seed.")
    measure_costs: bool = Field(
        True, description="Measure step time and peak memory beside plain LoRA's, after the trainings."
    )

    _added: bool = PrivateAttr(False)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """The sweep chooses on held-out rows, so unless told otherwise they stay out of the training."""
        if isinstance(value, dict) and isinstance(value.get("train"), dict):
            value = {**value, "train": {"use_held_out": False, **value["train"]}}
        return share_top_k(value)

    @model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks has entries of the same name: {names}. Give each a name of its own.")
        if not any(method.strategy == PLAIN_LORA for method in self.methods):
            self.methods, self._added = [MethodConfig(name=PLAIN_LORA), *self.methods], True
        self.output = self.output or f"comparisons/{self.name}"
        for task in self.tasks:
            self._check(task)
        return self

    def _check(self, task: ComparedTask) -> None:
        try:
            self.run_config(task)
        except ValidationError as error:
            found = " ".join(problems(error, RunConfig))
            raise ValueError(f"task {task.name!r}: {found}") from None

    def run_config(self, task: ComparedTask) -> RunConfig:
        """The recipe of one task."""
        parts = {
            name: {**getattr(self, name).model_dump(), **getattr(task, name)}
            for name in ("train", "budget", "evaluation")
        }
        shared = ("model", "mixture", "search", "sweep", "methods", "seeds", "search_per_seed")
        return RunConfig.model_validate(
            {
                "name": f"{self.name}, {task.name}",
                "output": str(self.folder / "tasks" / task.name),
                "task": task.task(),
                **parts,
                **{name: getattr(self, name) for name in shared},
            }
        )

    def task(self, name: str) -> ComparedTask:
        """The task of that name."""
        return next(task for task in self.tasks if task.name == name)

    @property
    def reference(self) -> MethodConfig:
        """The row that everything is tested against: plain LoRA."""
        return next(method for method in self.methods if method.strategy == PLAIN_LORA)

    @property
    def reference_added(self) -> bool:
        """Whether plain LoRA was not among the methods that were asked for."""
        return self._added

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()
