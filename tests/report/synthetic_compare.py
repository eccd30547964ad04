"""A made-up but plausible compare.json: no training, fixed by a seed."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

import synthetic_results as synthetic

METHODS: dict[str, tuple[str, str, str, float, float]] = {
    "lora": ("LoRA (PEFT)", "one low-rank pair per linear", "2106.09685", 0.0, 1.0),
    "guilomo": ("GuiLoMo (searched)", "expert counts and ranks from a bilevel search", "2506.14646", 0.035, 1.42),
    "rslora": ("rsLoRA", "LoRA scaled by the root of the rank", "2312.03732", 0.008, 1.0),
    "dora": ("DoRA", "magnitude and direction apart", "2402.09353", 0.011, 1.31),
    "lora_plus": ("LoRA+", "two learning rates, for A and for B", "2402.12354", 0.009, 1.01),
    "pissa": ("PiSSA", "starts at the principal singular directions", "2404.02948", 0.013, 1.0),
    "mola": ("MoLA ▽ (2-4-6-8)", "more experts in higher layers", "2402.08562", 0.004, 1.44),
    "alphalora": ("AlphaLoRA", "experts by the heavy tails of each layer", "2410.10054", 0.006, 1.43),
    "loramoe": ("LoRAMoE", "dense routing with localized balance", "2312.09979", -0.002, 1.52),
    "hydralora": ("HydraLoRA", "one A shared by several B", "2404.19245", 0.012, 1.37),
    "mosld": ("MoSLD", "shared A with dropout", "2412.08946", 0.002, 1.36),
    "moslora": ("MoSLoRA", "mixes the subspaces of one pair", "2406.11909", 0.007, 1.05),
    "adamole": ("AdaMoLE", "a threshold decides how many experts", "2405.00361", -0.005, 1.55),
    "ld_mole": ("LD-MoLE", "learnable dynamic routing by a sparse projection", "2509.25684", 0.010, 1.68),
    "smora": ("SMoRA", "every rank is an expert", "2501.15103", 0.003, 1.29),
    "flylora": ("FlyLoRA", "frozen sparse A, top ranks by magnitude", "2510.08396", -0.030, 0.92),
    "meteora": ("MeteoRA", "top-k over ready adapters", "2405.13053", -0.012, 1.40),
    "uniform": ("uniform experts and ranks", "4 experts of equal rank everywhere", "", 0.005, 1.38),
    "random": ("random allocation", "drawn from the space of the search, anew for every seed", "", 0.001, 1.41),
    "shuffled": ("searched, shuffled among equal shapes", "the searched experts dealt out anew", "", 0.015, 1.42),
}
TASKS = {"sst2": 0.80, "mrpc": 0.69, "emotions": 0.57, "scienceqa": 0.48}
ROUTED = ("guilomo", "mola", "loramoe", "ld_mole", "random")
RATES = (0.001, 0.003, 0.01, 0.03)
SEARCHED = ("guilomo", "random")


def comparison(methods: int = 20, tasks: int = 4, seeds: int = 3, **changes: Any) -> dict[str, Any]:
    """A comparison of the first methods and tasks; `changes` replace its parts."""
    names, kinds = list(METHODS)[:methods], list(TASKS)[:tasks]
    entries = [_method(name, kinds, list(range(seeds))) for name in names]
    _rank(entries, kinds)
    base = _base(kinds, seeds, methods) | {"methods": entries, "tests": _tests(entries, kinds)}
    base["friedman"]["mean_ranks"] = _block_ranks(entries, kinds)
    return base | changes


def _method(name: str, tasks: list[str], seeds: list[int]) -> dict[str, Any]:
    label, summary, paper, _, _ = METHODS[name]
    kinds = {"lora": "baseline", "guilomo": "searched", "random": "control", "shuffled": "control"}
    return {
        "name": name,
        "label": label,
        "summary": summary,
        "paper": f"arXiv:{paper}" if paper else "",
        "maturity": "experimental" if name in ("meteora", "ld_mole") else "stable",
        "kind": kinds.get(name, "method"),
        "tasks": {task: _on_task(name, task, seeds) for task in tasks},
        "mean_rank": None,
    }


def _on_task(name: str, task: str, seeds: list[int]) -> dict[str, Any]:
    rng = random.Random(name + task)
    gain, slow = METHODS[name][3:]
    allocation = _plan(name, task)
    values = [TASKS[task] + gain + rng.gauss(0, 0.006) for _ in seeds]
    half = 0.006 + 0.01 * rng.random()
    step = slow * (1 + 0.02 * rng.random())
    return {
        "parameters": allocation.parameters(),
        "active_parameters": allocation.active_parameters(),
        "learning_rate": rng.choice(RATES),
        "sweep": None,
        "cells": [_cell(name, task, seed, value) for seed, value in zip(seeds, values, strict=True)],
        "mean": fmean(values),
        "low": fmean(values) - half,
        "high": fmean(values) + half,
        "rank": None,
        "allocation": allocation.to_dict(),
        "router": synthetic._router(allocation, rng) if name in ROUTED else None,
        "step_time_ratio": {"median": step, "low": step - 0.02, "high": step + 0.03},
        "peak_bytes_ratio": 1 + 0.1 * slow * rng.random(),
    } | _swept(rng)


def _plan(name: str, task: str) -> Any:
    """LoRA's plan for most methods; that of a search differs between tasks."""
    kind = name if name in (*SEARCHED, "mola", "uniform") else "lora"
    found = synthetic.plan(kind)
    if name in SEARCHED:
        shift = list(TASKS).index(task)
        plans = list(found.modules.values())
        # The same plans dealt out one row of modules later per task.
        moved = plans[6 * shift :] + plans[: 6 * shift]
        found = type(found)(dict(zip(found.modules, moved, strict=True)), strategy=name)
    return found


def _swept(rng: random.Random) -> dict[str, Any]:
    losses = [0.5 + 0.06 * abs(place - rng.choice((0, 1, 2))) + 0.02 * rng.random() for place in range(len(RATES))]
    rates = [
        {"learning_rate": rate, "loss": loss, "diverged": None, "seconds": 30.0}
        for rate, loss in zip(RATES, losses, strict=True)
    ]
    if rng.random() < 0.2:
        rates[-1] |= {"loss": None, "diverged": "the loss was nan at step 12"}
    known = [one for one in rates if one["loss"] is not None]
    chosen = min(known, key=lambda one: one["loss"])["learning_rate"]  # type: ignore[arg-type,return-value]
    return {
        "learning_rate": chosen,
        "sweep": {"rates": rates, "chosen": chosen, "edge": chosen in (RATES[0], RATES[-1])},
    }


def _cell(name: str, task: str, seed: int, value: float) -> dict[str, Any]:
    return {
        "seed": seed,
        "status": "done",
        "error": None,
        "value": value,
        "metrics": {"accuracy": value, "loss": 1.2 - value},
        "train_seconds": 88.0 + seed,
        "folder": f"cells/{task}/{name}/seed-{seed}",
    }


def fail(compare: dict[str, Any], method: str, task: str, seeds: list[int], error: str = "the loss was nan") -> None:
    """Turns cells into failed ones; a task without any done cell loses its numbers."""
    entry = next(one for one in compare["methods"] if one["name"] == method)["tasks"][task]
    for cell in entry["cells"]:
        if cell["seed"] in seeds:
            cell |= {"status": "failed", "error": error, "value": None, "metrics": {}}
            compare["failures"].append({"task": task, "method": method, "seed": cell["seed"], "error": error})
    if all(cell["status"] == "failed" for cell in entry["cells"]):
        entry |= dict.fromkeys(("mean", "low", "high", "rank"))
        compare["tests"] = [test for test in compare["tests"] if (test["method"], test["task"]) != (method, task)]


def _rank(methods: list[dict[str, Any]], tasks: list[str]) -> None:
    for task in tasks:
        order = sorted(methods, key=lambda method: -method["tasks"][task]["mean"])
        for place, method in enumerate(order):
            method["tasks"][task]["rank"] = place + 1.0
    for method in methods:
        method["mean_rank"] = fmean(method["tasks"][task]["rank"] for task in tasks)


def _block_ranks(methods: list[dict[str, Any]], tasks: list[str]) -> dict[str, float]:
    """Mean ranks over blocks of task and seed, which differ from those of the means over seeds."""
    found: dict[str, list[float]] = {method["name"]: [] for method in methods}
    for task in tasks:
        for cells in zip(*(method["tasks"][task]["cells"] for method in methods), strict=True):
            order = sorted(range(len(cells)), key=lambda place: -cells[place]["value"])
            for rank, place in enumerate(order):
                found[methods[place]["name"]].append(rank + 1.0)
    return {name: fmean(ranks) for name, ranks in found.items()}


def _tests(methods: list[dict[str, Any]], tasks: list[str]) -> list[dict[str, Any]]:
    found = []
    for task in tasks:
        base = next(method for method in methods if method["name"] == "lora")["tasks"][task]["mean"]
        for method in methods:
            if method["name"] == "lora":
                continue
            difference, rng = method["tasks"][task]["mean"] - base, random.Random(method["name"] + task)
            fixed = {"task": task, "method": method["name"]}
            found.append(fixed | _test(rng, "accuracy", difference))
            found.append(fixed | _test(rng, "loss", 0.004 - 1.2 * difference))
    return found


def _test(rng: random.Random, metric: str, difference: float) -> dict[str, Any]:
    half = 0.012 + 0.008 * rng.random()
    p = 0.0004 if abs(difference) > half + 0.006 else 0.03 if abs(difference) > half else 0.4
    return {
        "metric": metric,
        "difference": difference,
        "low": difference - half,
        "high": difference + half,
        "p": p,
        "p_corrected": min(1.0, p * 40),
        "test": "Student's t over seeds and rows",
    }


def _task(name: str) -> dict[str, Any]:
    guessing = name == "scienceqa"
    return {
        "name": name,
        "kind": "classification",
        "hash": f"sha256:{random.Random(name).getrandbits(96):024x}",
        "sizes": {"train": 900, "held_out": 300, "test": 500},
        "metric": "accuracy",
        "higher_is_better": True,
        "chance": 0.47 if guessing else 0.5,
        "budget": 294912,
        "above_chance": not guessing,
        "chance_note": "LoRA reaches 48.0 %, always saying the most frequent class 47.0 %." if guessing else "",
    }


def _base(tasks: list[str], seeds: int, methods: int) -> dict[str, Any]:
    critical = 0.62 * methods / max(len(tasks) * seeds, 1) ** 0.5 + 1.0
    return {
        "schema": 1,
        "guilomo": "0.1.0",
        "name": "family",
        "command": "guilomo compare recipes/family.yaml",
        "created": "2026-11-26T19:40:12+00:00",
        "status": "complete",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "peft": "0.21.2"},
        "hardware": {"cpu": "AMD EPYC 9354", "cores": 2, "memory_gib": 16.0, "gpu": None},
        "config": {"model": "minilm", "seeds": list(range(seeds))},
        "model": {"name": "nreimers/MiniLM-L6-H384-uncased", "parameters": 22_713_216},
        "reference": "lora",
        "seeds": list(range(seeds)),
        "tasks": [_task(name) for name in tasks],
        "friedman": {
            "statistic": 31.2,
            "p": 0.0021,
            "critical_difference": critical,
            "alpha": 0.05,
            "n_blocks": len(tasks) * seeds,
            "blocks": "tasks x seeds",
        },
        "failures": [],
        "verdict": [
            "GuiLoMo (searched) is better than LoRA (PEFT) beyond noise on 3 of 3 tasks.",
            "No other method can be told from LoRA (PEFT) on every task.",
        ],
    }
