"""A recipe for one method, made from what its row and the run's defaults are, so that it cannot fall behind them."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Any

import yaml
from pydantic import BaseModel

from guilomo.allocation.layerwise import Terms
from guilomo.allocation.registry import STRATEGIES, strategy_options
from guilomo.layers.balance import balance_options
from guilomo.layers.routers import router_class, router_options
from guilomo.methods import Method, method_named
from guilomo.run.config import PLAIN_LORA, RANDOM, RATES, MethodConfig, MixtureConfig, RunConfig
from guilomo.run.methods import FROM_SEARCH, READY_MADE

WIDTH = 120

SEARCH_SPACE = ("max_experts", "max_rank", "min_experts")
WRITTEN = {
    "model": ("path",),
    "task": ("kind", "source", "max_length", "train_size"),
    "mixture": ("target_modules", "alpha", "scaling", "dropout"),
    "budget": ("parameters", "experts", "rank"),
    "search": (
        *SEARCH_SPACE,
        "relaxation",
        "masks",
        "hypergradient",
        "steps",
        "batch_size",
        "held_out_batch_size",
        "learning_rate",
        "outer_learning_rate",
    ),
    "train": ("epochs", "batch_size", "learning_rate"),
}
"""The keys of each group that are written out; `guilomo run --help` has the others."""

PLANNED_BY_THE_RUN = (PLAIN_LORA, "uniform", RANDOM)
"""Strategies whose options are the recipe's budget and search space."""

FAIR = """\
# One seed at one rate shows that it runs, not whether it helps. For that take the "# " off the lines below; for several
# tasks, with tests, see guilomo compare --help."""


def method_recipe(name: str) -> str:
    """A commented recipe, as YAML text, that trains a method beside plain LoRA on the packaged model and data.

    It says what ``guilomo run`` does when it is given the two names alone: defaults that make the method what it is are
    written out, to be edited.

    Raises:
        GuilomoError: no such method.
    """
    method = method_named(name)
    row = MethodConfig(name=name, options=method.needs)
    config = RunConfig(name=f"try-{name}", methods=[row])
    routing = _routing(method, config.mixture_of(row)) if _is_routed(method) else {}
    # A searched mixture is that of the whole run: the search starts from it, and a row cannot change it.
    common, own = (routing.keys(), {}) if name in FROM_SEARCH else ((), routing)
    lines = [
        *_header(method),
        f"name: {config.name}",
        *_group(config, "model"),
        *_group(config, "task"),
        *_group(config, "mixture", (*WRITTEN["mixture"], *common)),
        *_group(config, "budget"),
        *_search(config, name),
        "methods:",
        *([] if name == PLAIN_LORA else [f"  - {PLAIN_LORA}"]),
        *_row(method, own),
        *_group(config, "train"),
        *_fair_comparison(name),
    ]
    return "\n".join(lines) + "\n"


def _header(method: Method) -> list[str]:
    facts = [_comment(f"{key:<13}  {value}", "", " " * 15) for key, value in method.facts.items()]
    return [
        f"# {method.label}",
        *_comment(method.summary),
        *(line for fact in facts for line in fact),
        "#",
        f"#   guilomo methods {method.name} --recipe > {method.name}.yaml",
        f"#   guilomo run {method.name}.yaml",
        "#",
        "# guilomo run --help lists every other key.",
    ]


def _is_routed(method: Method) -> bool:
    """Whether it has a mixture of ours, which is then its own or the run's."""
    allocated = method.strategy in (*STRATEGIES, *FROM_SEARCH) and method.strategy != PLAIN_LORA
    return allocated or bool(method.mixture)


def _search(config: RunConfig, name: str) -> list[str]:
    """What a search needs; the random control draws from what the search may choose."""
    if name == RANDOM:
        return _group(config, "search", SEARCH_SPACE)
    return _group(config, "search") if name in FROM_SEARCH else []


def _routing(method: Method, mixture: MixtureConfig) -> dict[str, Any]:
    """The fields of a mixture that make the method what it is, their options completed."""
    router = router_class(mixture.router)
    names = {*method.mixture, "router", "router_options", "balance_loss"}
    if not router.dense and method.grows != "experts":
        names.add("top_k")
    if router.own_loss:
        names.add("router_loss_coefficient")
    if mixture.balance_loss:
        names.add("balance_coefficient")
    completed = {"router_options": router_options(mixture.router, mixture.router_options)}
    if options := balance_options(mixture.balance_loss, mixture.balance_options):
        completed["balance_options"] = options
    return {**_values(mixture, names), **completed}


def _row(method: Method, mixture: Mapping[str, Any]) -> list[str]:
    options = _options(method)
    if not options and not mixture:
        return [f"  - {method.name}"]
    lines = [f"  - name: {method.name}"]
    if options:
        lines += _commented("    options:", _about_options(method))
        known = READY_MADE[method.starts_from].options.model_fields if method.starts_from else {}
        for key, value in options.items():
            lines += _commented(f"      {key}: {_inline(value)}", known[key].description or "" if known else "")
    if mixture:
        lines += ["    mixture:", *_fields(MixtureConfig, mixture, "      "), *_of_several_tasks(method)]
    return lines


def _of_several_tasks(method: Method) -> list[str]:
    """What is different where the method reads which task a row is of."""
    if not method.mixed:
        return []
    fields = "; ".join(
        f"{key}: {_inline(value)}" for key, value in method.mixture_for(2).items() if key in method.mixed
    )
    experts = " Experts are then one for each." if method.expert_per_part else ""
    text = f"Of two tasks trained as one (parts, under task) it would have {fields}.{experts}"
    return _comment(text, "      ")


def _options(method: Method) -> dict[str, Any]:
    """Options of the row: those that it must have, and defaults of its allocation."""
    if method.grows:
        return {**method.needs, "experts": method.experts or 1}
    if method.starts_from:
        return {**method.needs, **method.options}
    if method.strategy not in STRATEGIES or method.strategy in PLANNED_BY_THE_RUN:
        return method.needs
    defaults = strategy_options(method.strategy).items()
    own = {key: value for key, value in defaults if key not in Terms.__annotations__}
    return {**method.needs, **{key: value for key, value in own.items() if isinstance(value, (int, float, str))}}


def _about_options(method: Method) -> str:
    if method.grows == "rank":
        return "Experts of every module; the budget buys their rank."
    if method.grows == "experts":
        by = {"chosen": "K", "experts": "the number of experts"}
        scale = f"; alpha is divided by {by[method.scale_by]}" if method.scale_by else ""
        share = Fraction(method.share).limit_denominator(100)
        return f"Experts it starts with; the budget buys more. K is {share} of them, at least 2{scale}."
    if method.starts_from:
        return "See docs/banks.md."
    return "Ranks are wishes: the budget scales them." if method.strategy in STRATEGIES else ""


def _fair_comparison(name: str) -> list[str]:
    rates = ", ".join(map(str, RATES))
    return [
        FAIR,
        "#   use_held_out: false  # Of train: the sweep chooses on these rows.",
        f"# sweep: {{learning_rates: [{rates}]}}  # Every method at its best rate.",
        "# seeds: [0, 1, 2]",
        *(["# search_per_seed: true"] if name in FROM_SEARCH else []),
    ]


def _values(model: BaseModel, names: Collection[str]) -> dict[str, Any]:
    """The fields of these names, in the order of their class."""
    return {name: getattr(model, name) for name in type(model).model_fields if name in names}


def _group(config: RunConfig, key: str, names: Collection[str] = ()) -> list[str]:
    """A group of the recipe: the fields of these names, or those of `WRITTEN`."""
    group: BaseModel = getattr(config, key)
    return [f"{key}:", *_fields(type(group), _values(group, names or WRITTEN[key]), "  ")]


def _fields(kind: type[BaseModel], values: Mapping[str, Any], indent: str) -> list[str]:
    """A line for each value, with what its class says about the field."""
    return [
        line
        for name, value in values.items()
        for line in _commented(f"{indent}{name}: {_inline(value)}", kind.model_fields[name].description or "")
    ]


def _commented(line: str, text: str) -> list[str]:
    """The comment behind its line, or above it where it is too long for that."""
    if not text:
        return [line]
    behind = f"{line}  # {text}"
    return [behind] if len(behind) <= WIDTH else [*_comment(text, line[: len(line) - len(line.lstrip())]), line]


def _comment(text: str, indent: str = "", hanging: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# {hanging}")


def _inline(value: Any) -> str:
    """A value as YAML on one line; inside of a list, since a bare one is written as a document of its own."""
    return yaml.safe_dump([value], default_flow_style=True, sort_keys=False, width=10**6).strip()[1:-1]
