"""A made-up but plausible results.json: no training, fixed by a seed."""

from __future__ import annotations

import math
import random
from typing import Any

from guilomo.allocation.plan import Allocation, ModulePlan

MINILM = (
    ("attention.self.query", 384, 384),
    ("attention.self.key", 384, 384),
    ("attention.self.value", 384, 384),
    ("attention.output.dense", 384, 384),
    ("intermediate.dense", 384, 1536),
    ("output.dense", 1536, 384),
)
LLAMA = (
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 4096, 1024),
    ("self_attn.v_proj", 4096, 1024),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 4096, 14336),
    ("mlp.up_proj", 4096, 14336),
    ("mlp.down_proj", 14336, 4096),
)
LABELS = {
    "guilomo": ("GuiLoMo (searched)", "searched", 0.874, 1.42),
    "random": ("Random allocation", "control", 0.861, 1.41),
    "uniform": ("Uniform 4 × rank 2", "baseline", 0.866, 1.38),
    "mola": ("MoLA ▽ (2-4-6-8)", "baseline", 0.863, 1.44),
    "lora": ("LoRA rank 8", "baseline", 0.868, 1.0),
}


def plan(kind: str, layers: int = 6, shapes: Any = MINILM, stack: str = "encoder.layer") -> Allocation:
    """An allocation with mixed ranks and unadapted modules for `guilomo`, a regular one otherwise."""
    rng = random.Random(kind)
    modules = {}
    for layer in range(layers):
        for index, (name, rows, columns) in enumerate(shapes):
            if kind in ("guilomo", "random"):
                depth = layer / layers if kind == "guilomo" else 0.5
                experts = max(0, min(8, round(1 + 4 * depth + (index in (2, 4)) + rng.gauss(0, 1))))
                ranks = tuple(max(1, round(rng.gauss(2 + 2 * depth, 1))) for _ in range(experts))
            else:
                experts = {"uniform": 4, "lora": 1, "mola": 2 + 2 * (layer * 4 // layers)}[kind]
                ranks = (8,) if kind == "lora" else (2,) * experts
            modules[f"{stack}.{layer}.{name}"] = ModulePlan(rows, columns, ranks, min(2, len(ranks)) or 1)
    return Allocation(modules, strategy=kind)


def _router(allocation: Allocation, rng: random.Random) -> dict[str, Any] | None:
    load, entropy, dead = {}, {}, {}
    for name, module in allocation.adapted().items():
        if module.experts == 1:
            continue
        raw = [rng.gammavariate(3, 1) for _ in range(module.experts)]
        if rng.random() < 0.06:
            raw[-1] = 0.0
        share = [value / sum(raw) for value in raw]
        load[name] = share
        entropy[name] = -sum(p * math.log(p) for p in share if p) / math.log(len(share))
        dead[name] = sum(p == 0 for p in share)
    return {"load": load, "entropy": entropy, "dead": dead} if load else None


def _metrics(value: float, loss: float, n: int = 2000) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {
        "accuracy": {"value": value, "low": value - half, "high": value + half, "n": n},
        "loss": {"value": loss, "low": loss - 0.02, "high": loss + 0.02, "n": n},
    }


def _curve(rng: random.Random) -> list[list[float]]:
    return [[s, 1.7 * math.exp(-s / 120) + 0.38 + rng.gauss(0, 0.05)] for s in range(0, 600, 5)]


def method(name: str, layers: int = 6, shapes: Any = MINILM, stack: str = "encoder.layer") -> dict[str, Any]:
    """One method with two seeds."""
    label, kind, accuracy, slow = LABELS[name]
    allocation, rng = plan(name, layers, shapes, stack), random.Random(name + "runs")
    runs: list[dict[str, Any]] = []
    for seed in (0, 1):
        value = accuracy + rng.gauss(0, 0.003)
        runs.append(
            {
                "seed": seed,
                "metrics": _metrics(value, 1.2 - value),
                "train_seconds": 88 * slow,
                "step_seconds": 0.147 * slow,
                "loss_curve": _curve(rng),
                "router": _router(allocation, rng),
            }
        )
    found = {m: [run["metrics"][m] for run in runs] for m in ("accuracy", "loss")}
    summary = {m: {k: sum(v[key] for v in vs) / 2 for k, key in _KEYS} | {"seeds": 2} for m, vs in found.items()}
    return {
        "name": name,
        "label": label,
        "kind": kind,
        "allocation": allocation.to_dict(),
        "parameters": allocation.parameters(),
        "active_parameters": allocation.active_parameters(),
        "flops_per_token": allocation.flops_per_token(),
        "runs": runs,
        "summary": summary,
    }


_DATA = {
    "name": "emotions",
    "kind": "classification",
    "hash": "sha256:9f2c4e1a7b60d83c55aa10ef",
    "sizes": {"train": 8000, "held_out": 2000, "test": 2000},
    "labels": ["sadness", "joy", "love", "anger", "fear", "surprise"],
    "chance": 0.167,
    "truncated": 12,
}
_KEYS = (("mean", "value"), ("low", "low"), ("high", "high"))


def search(layers: int = 6, shapes: Any = MINILM, stack: str = "encoder.layer", steps: int = 200) -> dict[str, Any]:
    """A search whose vectors drift from their start towards different ends."""
    rng, names = random.Random(7), list(plan("uniform", layers, shapes, stack).modules)
    ends = {name: (rng.uniform(1.5, 6.5), rng.uniform(1.2, 5.5)) for name in names}
    at = [1 - math.exp(-3 * s / steps) for s in range(steps)]
    experts = {name: [4 + (end - 4) * a + rng.gauss(0, 0.02) for a in at] for name, (end, _) in ends.items()}
    ranks = {name: [3 + (end - 3) * a + rng.gauss(0, 0.02) for a in at] for name, (_, end) in ends.items()}
    return {
        "relaxation": "nested-prefix",
        "hypergradient": "one-step finite difference",
        "steps": steps,
        "outer_steps": steps // 2,
        "seconds": 214.0,
        "stopped_early": False,
        "estimate": {"modules": len(names)},
        "moved": {
            "experts": {"mean": 1.31, "max": 2.4},
            "ranks": {"mean": 1.08, "max": 2.2},
            "modules": 0.92,
            "warning": None,
        },
        "trajectory": {
            "step": list(range(steps)),
            "train_loss": [1.7 * math.exp(-s / 60) + 0.5 + rng.gauss(0, 0.06) for s in range(steps)],
            "held_out_loss": [1.6 * math.exp(-s / 70) + 0.62 + rng.gauss(0, 0.04) for s in range(steps)],
            "expected_parameters": [290_000 - 66_000 * a for a in at],
            "experts": experts,
            "ranks": ranks,
        },
    }


def results(**changes: Any) -> dict[str, Any]:
    """A complete run; `changes` replace its parts."""
    return _base() | {"search": search(), "methods": [method(name) for name in LABELS]} | changes


def _base() -> dict[str, Any]:
    return {
        "guilomo": "0.1.0",
        "schema": 1,
        "name": "demo",
        "command": "guilomo run recipes/demo.yaml",
        "created": "2025-11-22T19:40:12+00:00",
        "status": "complete",
        "versions": {"python": "3.12.4", "torch": "2.13.0", "transformers": "5.1.0", "peft": "0.19.0"},
        "hardware": {"cpu": "AMD EPYC 9354", "cores": 2, "memory_gib": 16.0, "gpu": None},
        "seconds": {"search": 214.0, "train": 1170.0, "total": 1432.0},
        "config": {
            "model": {"name": "nreimers/MiniLM-L6-H384-uncased"},
            "search": {"outer": {"lr": 0.003}, "experts": 8},
        },
        "data": _DATA,
        "model": {"name": "nreimers/MiniLM-L6-H384-uncased", "parameters": 22_713_216},
        "budget": {"parameters": 228_096, "source": "uniform 4 experts x rank 2"},
        "tests": [
            _test("lora", 0.006, -0.006, 0.018, 0.31, 0.62),
            _test("random", 0.013, 0.002, 0.024, 0.018, 0.072),
            _test("uniform", 0.008, -0.003, 0.019, 0.17, 0.51),
        ],
        "primary_metric": "accuracy",
        "verdict": [
            "GuiLoMo reached 87.4 % accuracy, 0.6 points above LoRA rank 8 at the same budget.",
            "With two seeds and 2,000 test examples this run cannot tell the two apart.",
        ],
    }


def _test(other: str, *numbers: float) -> dict[str, Any]:
    keys = ("difference", "low", "high", "p", "p_corrected")
    fixed = {"a": "guilomo", "b": other, "metric": "accuracy", "test": "McNemar exact"}
    return fixed | dict(zip(keys, numbers, strict=True))
