"""What each command does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from guilomo.allocation import Allocation, RouterCost, linear_router
from guilomo.cli.adapters import adapter_config, adapter_folder, load_adapter
from guilomo.cli.bank import build_from_bank, list_bank, select_from_bank
from guilomo.cli.compare import compare
from guilomo.cli.export import export
from guilomo.cli.methods import list_methods
from guilomo.cli.progress import shown_progress, stop_on_signal
from guilomo.cli.screen import console, print_table
from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.evaluation import evaluate as score
from guilomo.evaluation import run_lm_eval
from guilomo.files import check_checksum, refuse_pickle
from guilomo.layers.routers import cost_of_router
from guilomo.methods import METHODS
from guilomo.report import (
    allocation_table,
    comparison_table,
    parts_table,
    plot_allocation,
    plot_headline,
    save_figure,
    write_report,
)
from guilomo.report.reading import part_names
from guilomo.run import Run, load_recipe
from guilomo.run.config import MethodConfig, RunConfig
from guilomo.run.dry import cut_texts, dry_run
from guilomo.run.files import read_json, write_json
from guilomo.run.methods import FROM_SEARCH, model_shapes, plan_method, resolve_budget, router_cost
from guilomo.run.model import load_model, model_path
from guilomo.run.searches import search_folder, search_seeds
from guilomo.search.distributed import process_group, rank
from guilomo.tuner import LoraMoeConfig


@contextmanager
def _prepared(arguments: argparse.Namespace, resumable: bool = True) -> Iterator[Run]:
    """The run of a recipe command, with progress and orderly stopping."""
    config = load_recipe(arguments.recipe, arguments.overrides)
    quiet = arguments.quiet or rank() > 0
    with stop_on_signal() as should_stop, shown_progress(console, quiet) as progress:
        job = Run(config, arguments.typed, progress, should_stop)
        if resumable:
            job.prepare(arguments.resume)
        yield job


def _dry(arguments: argparse.Namespace) -> bool:
    if arguments.dry_run:
        with _prepared(arguments, resumable=False) as job:
            report = dry_run(job)
        for name, plan in report.plans.items():
            router = router_cost(job.config, next(m for m in job.config.methods if m.name == name))
            console.print(f"\n{name}: {plan.parameters(router):,} parameters", style="bold", highlight=False)
            console.print(plan.table(router), highlight=False, markup=False, soft_wrap=True)
        console.print("\n" + report.summary, highlight=False, markup=False)
    return bool(arguments.dry_run)


def run(arguments: argparse.Namespace) -> None:
    if _dry(arguments):
        return
    with _prepared(arguments) as job:
        results = job.all()
    _show(results, job.config.folder)
    if cut := cut_texts(job.task):
        console.print(f"{cut}.", highlight=False, markup=False)


def _show(results: dict[str, Any], folder: Path) -> None:
    print_table(comparison_table(results), comparison_table(_leading(results)))
    if part_names(results):
        print_table(parts_table(results))
    for sentence in [*results["verdict"], *_search_warnings(results)]:
        console.print(sentence, highlight=False, markup=False)
    console.print(f"\nreport   {folder / 'report.html'}\nresults  {folder / 'results.json'}", highlight=False)


def _search_warnings(results: dict[str, Any]) -> list[str]:
    """What the searches of a run say about having stayed where they started."""
    search = results["search"] or {}
    return [s["moved"]["warning"] for s in search.get("searches", [search]) if s and s["moved"]["warning"]]


def _leading(results: dict[str, Any]) -> dict[str, Any]:
    """Results with only the metric that the report leads with."""
    metric = results["primary_metric"]

    def only(found: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in found.items() if name == metric}

    methods = [
        {**m, "summary": only(m["summary"]), "runs": [{**r, "metrics": only(r["metrics"])} for r in m["runs"]]}
        for m in results["methods"]
    ]
    return {**results, "methods": methods}


def search(arguments: argparse.Namespace) -> None:
    if _dry(arguments):
        return
    with process_group(), _prepared(arguments) as job:
        plans = {seed: job.search(seed) for seed in search_seeds(job.config)}
        if rank() > 0:
            return
        results = job.write_results()
    for seed, plan in plans.items():
        print_table(allocation_table(plan))
        console.print(
            f"{plan.parameters(job.router_cost):,} of {job.facts['budget']:,} parameters.\n"
            f"allocation  {search_folder(job.config, seed) / 'allocation.json'}",
            highlight=False,
        )
    for found in results["search"].get("searches", [results["search"]]):
        console.print(_movement(found["moved"]), highlight=False)
    for sentence in _search_warnings(results):
        console.print(sentence, highlight=False, markup=False)


def _movement(moved: dict[str, Any]) -> str:
    return (
        "From start to end the search moved expert counts by {experts[mean]:.2f} on average (at most "
        "{experts[max]:.2f}) and ranks by {ranks[mean]:.2f} (at most {ranks[max]:.2f}); {share:.0%} of the modules got "
        "another plan than the start gives."
    ).format(**moved, share=moved["modules"])


def allocate(arguments: argparse.Namespace) -> None:
    config = load_recipe(arguments.recipe, arguments.overrides)
    known = [name for name, m in METHODS.items() if not m.starts_from and name not in FROM_SEARCH]
    if arguments.strategy not in known:
        raise unknown("--strategy", arguments.strategy, known)
    options = dict(_option(text) for text in arguments.options)
    job = Run(config)
    model = job.fresh_model(config.seeds[0])
    shapes = model_shapes(model, config, job.task)
    budget, source = resolve_budget(config, shapes)
    method = MethodConfig(name=arguments.strategy, options=options)
    plan = plan_method(method, config, model, shapes, budget)
    router = router_cost(config, method)
    console.print(plan.table(router), highlight=False, markup=False, soft_wrap=True)
    spent = plan.parameters(router)
    console.print(f"{spent:,} of {budget:,} parameters ({source}): {100 * spent / budget:.2f} %", highlight=False)
    _save_plan(plan, arguments)


def _option(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise invalid("--option", text, "key=value, such as groups=[2,4,6,8]")
    return key.strip(), yaml.safe_load(value)


def _save_plan(plan: Allocation, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "save", None):
        plan.save(arguments.save)
        console.print(f"written to {arguments.save}", highlight=False)
    if arguments.plot:
        save_figure(plot_allocation(plan), arguments.plot)
        console.print(f"drawn to {arguments.plot}", highlight=False)


def train(arguments: argparse.Namespace) -> None:
    if _dry(arguments):
        return
    with _prepared(arguments) as job:
        methods = {m.name: m for m in job.config.methods}
        if arguments.method not in methods:
            raise unknown("--method", arguments.method, methods)
        seed = job.config.seeds[0] if arguments.seed is None else arguments.seed
        result = job.train(methods[arguments.method], seed)
        job.write_results()
    _scores(result)
    folder = job.config.folder / "methods" / arguments.method / f"seed-{seed}" / "adapter"
    console.print(f"adapter  {folder}", highlight=False)


def _scores(result: dict[str, Any]) -> None:
    """Of the whole task, and of every part of a mixed one."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("metric", "value", "95 % interval", "n"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    scores = dict(result["metrics"])
    for part, metrics in result["parts"].items():
        scores |= {f"{part}: {name}": found for name, found in metrics.items()}
    for name, found in scores.items():
        interval = "–" if found["low"] is None else f"{found['low']:.4f} – {found['high']:.4f}"
        value = "not finite" if found["value"] is None else f"{found['value']:.4f}"
        table.add_row(name, value, interval, str(found["n"]))
    print_table(table)


def evaluate(arguments: argparse.Namespace) -> None:
    config = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.lm_eval:
        _refuse_classifier(config)
    adapter = adapter_folder(arguments.adapter)
    if arguments.lm_eval:
        content = _harness(arguments, config, adapter)
        console.print_json(json.dumps(content, default=str))
    else:
        with _prepared(arguments, resumable=False) as job:
            model = load_adapter(load_model(config.model, job.task, config.seeds[0]), adapter, parts=job.task.parts)
            options = config.evaluation
            result = score(
                model,
                job.task,
                arguments.split,
                options.batch_size,
                options.generate,
                lambda done, rows: job.progress(arguments.split, done, rows, ""),
            ).to_dict()
        content = {key: result[key] for key in ("task", "split", "data_hash", "metrics", "parts")}
        _scores(content)
    if arguments.save:
        write_json(Path(arguments.save), content)


def _refuse_classifier(config: RunConfig) -> None:
    """lm-eval asks for the likelihood of texts, which a classifier does not give."""
    if config.task.kind == "classification":
        raise GuilomoError(
            "--lm-eval contradicts task.kind = 'classification': lm-eval scores language models. Give the recipe of a "
            "causal_lm or lm run, or leave --lm-eval out to score the recipe's own task."
        )


def _harness(arguments: argparse.Namespace, config: RunConfig, adapter: Path) -> dict[str, Any]:
    """The scores of lm-eval, with the model as the recipe says."""
    where = {} if config.model.device == "auto" else {"device": config.model.device}
    found = run_lm_eval(
        model_path(config.model),
        adapter,
        arguments.lm_eval.split(","),
        include_path=arguments.include_path,
        include_defaults=arguments.include_path is None,
        model_args={"dtype": config.model.dtype},
        batch_size=config.evaluation.batch_size,
        limit=arguments.limit,
        **where,
    )
    return {name: found[name] for name in ("results", "n-samples", "versions") if name in found}


def inspect(arguments: argparse.Namespace) -> None:
    plan, router = _plan_at(Path(arguments.path))
    if arguments.diff:
        other, _ = _plan_at(Path(arguments.diff))
        console.print(plan.describe_diff(other) or "no difference", highlight=False, markup=False)
    elif arguments.json:
        console.print_json(plan.to_json())
    else:
        console.print(plan.table(router), highlight=False, markup=False, soft_wrap=True)
        for what, names in _names(Path(arguments.path)).items():
            numbered = ", ".join(f"{index} {name}" for index, name in enumerate(names))
            console.print(f"{what:<7}  {numbered}", highlight=False, markup=False)
    _save_plan(plan, arguments)


def _names(path: Path) -> dict[str, list[str]]:
    """What the experts of an adapter and the tasks that it was trained on are called, where they have names."""
    config = adapter_config(path) if (path / "adapter_config.json").is_file() else None
    if not isinstance(config, LoraMoeConfig):
        return {}
    return {k: v for k, v in (("experts", config.expert_names), ("tasks", config.task_names)) if v}


def _plan_at(path: Path) -> tuple[Allocation, RouterCost]:
    """The allocation in an adapter folder, a run folder (the searched one) or a JSON file, and what its routers cost.

    A plan alone does not say which router it is for; the linear one is assumed.
    """
    if (path / "adapter_config.json").is_file():
        config = adapter_config(path)
        refuse_pickle(path)
        check_checksum(path)
        if not isinstance(config, LoraMoeConfig) or config.plan is None:
            raise GuilomoError(
                f"{path} is a {str(config.peft_type).rpartition('.')[2]} adapter; only mixtures carry an allocation."
            )
        return config.plan, cost_of_router(config.router, config.router_options)
    for candidate in (path / "search" / "allocation.json", path / "allocation.json", path):
        if candidate.is_file():
            try:
                return Allocation.load(candidate), linear_router
            except UnicodeDecodeError:
                raise GuilomoError(f"{candidate} is not text; expected an allocation as JSON.") from None
    raise invalid("path", str(path), "an adapter folder, a run folder with a finished search, or an allocation.json")


def methods(arguments: argparse.Namespace) -> None:
    list_methods(arguments)


def bank(arguments: argparse.Namespace) -> None:
    if arguments.action == "list":
        list_bank(arguments)
    else:
        act = select_from_bank if arguments.action == "select" else build_from_bank
        act(arguments, partial(_prepared, resumable=False))


def report(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.folder)
    results = read_json(folder / "results.json")
    write_report(results, folder / "report.html")
    console.print(f"written to {folder / 'report.html'}", highlight=False)
    if arguments.picture:
        save_figure(plot_headline(results), arguments.picture)
        console.print(f"drawn to {arguments.picture}", highlight=False)


__all__ = [
    "allocate",
    "bank",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "methods",
    "report",
    "run",
    "search",
    "train",
]
