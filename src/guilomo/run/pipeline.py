"""The main job: search, train every method at one budget, score, compare, report. Each stage can be called alone.

Everything a stage makes lies in the run's folder; a stage whose result lies there is not done again.

    config.json                         the resolved recipe
    search/search.safetensors           checkpoint; search/allocation.json, search/search.json: the result;
                                        below search/seed-S/ where every training seed has its own search
    methods/NAME/sweep/, sweep.json     the trainings that its learning rate was chosen by (see `guilomo.run.sweep`)
    methods/NAME/seed-S/allocation.json the plan of a method for a training seed
    methods/NAME/seed-S/adapter/        the trained adapter; checkpoints/ while it is being trained
    methods/NAME/seed-S/result.json     its scores and per-row results
    results.json, report.html           the comparison
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from peft import get_peft_model
from torch import nn

from guilomo.allocation import Allocation, shuffled
from guilomo.errors import GuilomoError
from guilomo.evaluation import evaluate
from guilomo.report import write_report
from guilomo.run.claim import refuse_changes
from guilomo.run.compare import results_of
from guilomo.run.config import RANDOM, SEARCHED, SHUFFLED, MethodConfig, RunConfig
from guilomo.run.files import read_json, write_json, write_text
from guilomo.run.methods import (
    FROM_SEARCH,
    attach,
    check_methods,
    model_shapes,
    plan_method,
    ready_made,
    resolve_budget,
    router_cost,
    search_mixture,
)
from guilomo.run.model import load_model, load_tokenizer
from guilomo.run.records import score_record, training_record
from guilomo.run.searches import search_config, search_folder
from guilomo.run.sweep import learning_rate, reopen, take_over, waiting_result
from guilomo.run.trained import save_trained, trained_parameters
from guilomo.search import Search, carry_weights
from guilomo.search.distributed import rank
from guilomo.tasks import Task, build_task
from guilomo.training import Interrupted, fine_tune

StageProgress = Callable[[str, int, int, str], None]
"""Called with (stage, step, steps, a short text)."""


def _silent(stage: str, step: int, steps: int, text: str) -> None:
    """Progress for callers who want none."""


@dataclass
class Run:
    """One run of a recipe.

    Args:
        config: the recipe.
        command: what the user typed, for the report.
        progress: see `StageProgress`.
        should_stop: asked after every step; when true the step's checkpoint is written and `Interrupted` raised.
    """

    config: RunConfig
    command: str = ""
    progress: StageProgress = _silent
    should_stop: Callable[[], bool] = field(default=lambda: False)

    def __post_init__(self) -> None:
        check_methods(self.config)

    @cached_property
    def task(self) -> Task:
        return build_task(self.config.task, load_tokenizer(self.config.model))

    def fresh_model(self, seed: int) -> nn.Module:
        """The pretrained model as loaded, with a new head drawn from `seed`."""
        return load_model(self.config.model, self.task, seed)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What follows from the model: shapes of the adapted modules, the budget, the methods' plans."""
        model = self.fresh_model(self.config.seeds[0])
        shapes = model_shapes(model, self.config, self.task)
        budget, source = resolve_budget(self.config, shapes)
        plans = {
            m.name: plan_method(m, self.config, model, shapes, budget, self.config.seeds[0])
            for m in self.config.methods
            if m.strategy not in FROM_SEARCH and ready_made(m) is None
        }
        size = sum(p.numel() for p in model.parameters())
        return {"shapes": shapes, "budget": budget, "budget_source": source, "plans": plans, "parameters": size}

    def prepare(self, resume: bool) -> None:
        """Claims the run's folder.

        Raises:
            GuilomoError: it holds a run and `resume` is false, or a run of another recipe; see `refuse_changes`.
        """
        path = self.config.folder / "config.json"
        present = self.config.model_dump(mode="json")
        # A run that failed before its first checkpoint, on bad data for instance, claims nothing.
        if path.exists() and any((self.config.folder / part).exists() for part in ("search", "methods")):
            refuse_changes("run", self.config.folder, read_json(path), present, resume)
        if rank() == 0:
            write_json(path, present)
            for method in self.config.methods:
                reopen(self, method)

    def search(self, seed: int | None = None) -> Allocation:
        """The searched allocation; runs or continues the search if it is not there yet.

        In a process group all processes search together, and the first one writes.

        Args:
            seed: the training seed it is for, if each has its own search; unset: the first.
        """
        folder = search_folder(self.config, self.config.seeds[0] if seed is None else seed)
        if (folder / "search.json").exists():
            self.refuse_other_data(read_json(folder / "search.json"), folder)
            return Allocation.load(folder / "allocation.json")
        job = self.search_job(seed)
        stage = f"search seed {seed}" if self.config.search_per_seed else "search"
        result = job.run(lambda step, steps, text: self.progress(stage, step, steps, text), self.should_stop)
        if job.step < self.config.search.steps and not result.stopped_early:
            raise Interrupted(f"The search stopped at step {job.step} of {self.config.search.steps}.")
        self.progress(stage, job.step, job.step, result.moved.brief)
        if rank() == 0:
            write_text(folder / "allocation.json", result.allocation.to_json())
            write_json(folder / "search.json", {**result.to_dict(), "data_hash": self.task.data_hash})
        return result.allocation

    def search_job(self, seed: int | None = None) -> Search:
        """The search for a training seed, at its beginning; see `search`."""
        seed = self.config.seeds[0] if seed is None else seed
        options = search_config(self.config, seed)
        model = get_peft_model(self.fresh_model(options.seed), search_mixture(self.config, self.task))
        return Search(model, self.task, options, self.facts["budget"], search_folder(self.config, seed))

    def plan(self, method: MethodConfig, seed: int) -> Allocation:
        """The allocation of a method for one training seed; for which this runs the search, or chooses adapters.

        Raises:
            GuilomoError: the plan does not fit the model or the budget.
        """
        if (things := ready_made(method)) is not None:
            return things.plan(self, method)
        plan = self.search(seed) if method.strategy in FROM_SEARCH else self._made_plan(method, seed)
        if method.strategy == SHUFFLED:
            plan = shuffled(plan, seed)
        shapes = {name: shape for name, shape in self.facts["shapes"].items() if name in plan.modules}
        plan.check_against(shapes, self.facts["budget"], router_cost(self.config, method))
        return plan

    def _made_plan(self, method: MethodConfig, seed: int) -> Allocation:
        """Only the random control depends on the seed, and it needs no weights."""
        if method.strategy != RANDOM or "seed" in method.options:
            plan: Allocation = self.facts["plans"][method.name]
            return plan
        return plan_method(method, self.config, nn.Module(), self.facts["shapes"], self.facts["budget"], seed)

    def train(self, method: MethodConfig, seed: int) -> dict[str, Any]:
        """Trains and scores one method with one seed; returns the content of its result.json.

        With a sweep this first chooses the method's learning rate; the first seed's training there is the final one.
        """
        folder = self._folder(method, seed)
        if (folder / "result.json").exists():
            found: dict[str, Any] = read_json(folder / "result.json")
            self.refuse_other_data(found, folder)
            return found
        self.claim_for_data(folder)
        stage, rate = f"{method.name} seed {seed}", learning_rate(self, method)
        if (waited := waiting_result(folder, rate)) is not None:
            return waited
        if self.config.sweep.learning_rates and seed == self.config.seeds[0]:
            model, training = take_over(self, method, rate, folder)
        else:
            model, training = self.fit(method, seed, rate, folder, stage)
        result = {"seed": seed, "learning_rate": rate, **training, **self._score(model, stage)}
        write_json(folder / "result.json", result)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result

    def fit(
        self, method: MethodConfig, seed: int, learning_rate: float, folder: Path, stage: str
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Trains one method into a folder: allocation.json, adapter/, and checkpoints/ while it lasts.

        Returns:
            The trained model, and what there is to say about the training (see `training_record`).

        Raises:
            DivergedError: the loss is not finite.
            Interrupted: the run was asked to stop.
        """
        plan = self.plan(method, seed)
        write_text(folder / "allocation.json", plan.to_json())
        model = attach(self.fresh_model(seed), plan, method, self.config, self.task)
        self._refuse_above_budget(method, trained_parameters(model))
        if method.strategy == SEARCHED and self.config.train.start_from_search:
            self._start_from_search(model, seed)
        trained = fine_tune(
            model,
            self.task,
            self.config.train.model_copy(update={"learning_rate": learning_rate}),
            folder / "checkpoints",
            seed=seed,
            progress=lambda step, steps, text: self.progress(stage, step, steps, text),
            should_stop=self.should_stop,
        )
        save_trained(model, folder / "adapter")
        return model, {"trained_parameters": trained_parameters(model), **training_record(trained)}

    def _refuse_above_budget(self, method: MethodConfig, trained: int) -> None:
        """What is attached is counted, whatever its plan says; ready-made things come in the sizes they have."""
        if trained > self.facts["budget"]:
            raise GuilomoError(
                f"Method {method.name!r} would train {trained:,} parameters, but the budget is "
                f"{self.facts['budget']:,}. Start from fewer or from such of lower rank, or train their router alone "
                "(options.train: router)."
            )

    def _start_from_search(self, model: nn.Module, seed: int) -> None:
        job = self.search_job(seed)
        job.resume()
        if job.step == 0:
            raise GuilomoError(
                f"train.start_from_search needs the searched weights, but {job.folder} holds no "
                "checkpoint any more. Delete that folder to search again, or turn start_from_search off."
            )
        carry_weights(job.model, job.vectors, model)

    def claim_for_data(self, folder: Path) -> None:
        """Ties a half-done training to its rows; a checkpoint must not be continued on others."""
        marker = folder / "data.json"
        if marker.exists():
            self.refuse_other_data(read_json(marker), folder)
        write_json(marker, {"data_hash": self.task.data_hash})

    def refuse_other_data(self, found: dict[str, Any], folder: Path) -> None:
        """Results are compared row by row, so they must be of the same rows."""
        if found["data_hash"] != self.task.data_hash:
            raise GuilomoError(
                f"The data of {self.task.name!r} have changed since {folder} was made. Restore them, give another "
                "output folder (--set output=...), or delete this one."
            )

    def _score(self, model: nn.Module, stage: str) -> dict[str, Any]:
        scored = evaluate(
            model,
            self.task,
            batch_size=self.config.evaluation.batch_size,
            generate=self.config.evaluation.generate,
            progress=lambda done, rows: self.progress(f"{stage}: test", done, rows, ""),
        )
        return score_record(scored)

    def results(self) -> dict[str, Any]:
        """results.json from whatever stages are done."""
        return results_of(self)

    def write_results(self) -> dict[str, Any]:
        """Writes results.json and report.html from whatever stages are done."""
        results = self.results()
        write_json(self.config.folder / "results.json", results)
        write_report(results, self.config.folder / "report.html")
        return results

    def all(self) -> dict[str, Any]:
        """The whole job; results and page are rewritten after every training, and when the run is stopped."""
        results: dict[str, Any] = {}
        for seed, method in product(self.config.seeds, self.config.methods):
            present = (self._folder(method, seed) / "result.json").exists()
            try:
                self.train(method, seed)
            except Interrupted:
                self.write_results()
                raise
            if not present:
                results = self.write_results()
        return results or self.write_results()

    def _folder(self, method: MethodConfig, seed: int) -> Path:
        return self.config.folder / "methods" / method.name / f"seed-{seed}"

    @cached_property
    def router_cost(self) -> Any:
        return router_cost(self.config)
