"""The targets, and what the results say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.spread import ratio

Cells = Mapping[str, Mapping[str, Any]]
"""Results by the name of their cell."""
OURS_EXACT = ("ours", "ours:packed", "ours:fused", "ours:joined", "ours:sorted")
NOT_RUN = "not part of this run"


@dataclass(frozen=True)
class Reading:
    """One measured figure of a target.

    Attributes:
        label: which one it is.
        value: None if it was not measured; `why` says why.
        limit: the value must not be above it.
        low, high: the interval of a median of ratios.
        noisy: taken while other work ran.
    """

    label: str
    value: float | None
    limit: float
    low: float | None = None
    high: float | None = None
    noisy: bool = False
    why: str = ""

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.limit


@dataclass(frozen=True)
class Target:
    """A row of the table: number, what is measured, what is wanted, and how to read it off the results."""

    number: int
    what: str
    wanted: str
    read: Callable[[Cells], list[Reading]]

    def verdict(self, cells: Cells) -> tuple[str, list[Reading]]:
        """``met``, ``missed`` or ``not measured``, and the readings; met only if every reading is there and is."""
        readings = self.read(cells)
        if any(r.value is not None and not r.met for r in readings):
            return "missed", readings
        if not readings or any(r.value is None for r in readings):
            return "not measured", readings
        return "met", readings


def _absent(cells: Cells, name: str) -> str:
    """Why a cell has no results; empty if it has."""
    if name not in cells:
        return NOT_RUN
    return str(cells[name].get("error", ""))


def _ratio(cells: Cells, name: str, time: str, of: str, to: str, limit: float, label: str) -> Reading:
    why = _absent(cells, name)
    if why:
        return Reading(label, None, limit, why=why)
    timing = cells[name]["times"][time]
    found = ratio(timing, of, to)
    return Reading(label, found["median"], limit, found["low"], found["high"], timing["noisy"])


def _ratios(
    names: Mapping[str, str], time: str, of: str, to: str, limits: float | Mapping[str, float]
) -> Callable[[Cells], list[Reading]]:
    """The same ratio of several cells, labelled by their keys."""

    def read(cells: Cells) -> list[Reading]:
        limit = {label: limits if isinstance(limits, float) else limits[label] for label in names}
        return [_ratio(cells, name, time, of, to, limit[label], label) for label, name in names.items()]

    return read


def _counted(cells: Cells, name: str, label: str, limit: float, value: Callable[[Any], float]) -> Reading:
    """A figure of a cell that was counted rather than timed."""
    why = _absent(cells, name)
    return Reading(label, None, limit, why=why) if why else Reading(label, value(cells[name]), limit)


def _errors(cells: Cells) -> list[Reading]:
    def worst(variant: str) -> Callable[[Any], float]:
        return lambda cell: max(cell["errors"][variant].values())

    return [_counted(cells, "equality/naive", variant, 1e-12, worst(variant)) for variant in OURS_EXACT]


def _both_dtypes(name: str) -> dict[str, str]:
    return {dtype: f"{name}-{dtype}" for dtype in ("bf16", "fp32")}


def _peaks(cells: Cells) -> list[Reading]:
    def share(cell: Any) -> float:
        return float(cell["counts"]["ours"]["peak_bytes"] / cell["counts"]["peft"]["peak_bytes"])

    return [_counted(cells, name, dtype, 1.0, share) for dtype, name in _both_dtypes("step/llama").items()]


def _mixed(cells: Cells) -> list[Reading]:
    sizes = [f"{size}-R64-{dtype}" for dtype in ("bf16", "fp32") for size in ("d2048-T1024", "d1024-T256")]
    return [_ratio(cells, f"ranks/{size}", "forward_backward", "mixed", "uniform", 1.02, size) for size in sizes]


def regret(timing: Mapping[str, Any]) -> dict[str, float]:
    """Our own choice of path over the better of the two it chooses from."""
    return ratio(timing, "ours", better_path(timing))


def better_path(timing: Mapping[str, Any]) -> str:
    """The path with the smaller median."""
    ratios = timing["ratios"]
    return min(("ours:joined", "ours:sorted"), key=lambda path: float(ratios[path]["median"]))


def _regrets(cells: Cells) -> list[Reading]:
    """The worst cell of the grid."""
    grid = {name: cell for name, cell in cells.items() if name.startswith("choice/") and "error" not in cell}
    if not grid:
        return [Reading("worst of the grid", None, 1.05, why=NOT_RUN)]
    found = {name: regret(cell["times"]["forward_backward"]) for name, cell in grid.items()}
    worst = max(found, key=lambda name: found[name]["median"])
    timing = grid[worst]["times"]["forward_backward"]
    r = found[worst]
    label = f"worst of {len(grid)}: {worst.removeprefix('choice/')}"
    return [Reading(label, r["median"], 1.05, r["low"], r["high"], timing["noisy"])]


def _first_order(cells: Cells) -> list[Reading]:
    limits = {"fp32": 1.02, "bf16": 1.05}
    return [
        _ratio(cells, f"search/{masks}-{dtype}", "step", "pair", "plain", limit, f"{masks} masks, {dtype}")
        for masks in ("soft", "sampled")
        for dtype, limit in limits.items()
    ]


def _whole(cells: Cells) -> list[Reading]:
    name = "whole/stories260K"
    rows = cells[name]["options"]["rows"] if not _absent(cells, name) else 0
    label = f"second stage of {rows:,} rows" if rows else "second stage"
    return [_counted(cells, name, label, 0.25, lambda cell: float(cell["whole"]["ratio"]))]


def _decode_counts(cells: Cells) -> list[Reading]:
    def of(key: str) -> Callable[[Any], float]:
        return lambda cell: float(cell["counts"]["ours"][key])

    name = "decode/llama-bf16" if "decode/llama-bf16" in cells else "decode/small-bf16"
    return [
        _counted(cells, name, "kernels", 8.0, of("extra_kernels_per_linear")),
        _counted(cells, name, "data-dependent", 0.0, of("data_dependent_per_linear")),
    ]


def _compiled(cells: Cells) -> list[Reading]:
    """Graphs beyond those of the first token count, for training and for the search."""
    found = []
    for name in ("compile/training", "compile/search"):
        why = _absent(cells, name)
        if why:
            found.append(Reading(name.partition("/")[2], None, 0.0, why=why))
            continue
        for variant, graphs in cells[name]["compiled"].items():
            if variant == "frozen":
                continue
            label = f"{name.partition('/')[2]}, {variant}"
            # A graph that cannot be made at all is a break.
            value = float("inf") if "error" in graphs else float(graphs["graphs"][-1] - graphs["graphs"][0])
            found.append(Reading(label, value, 0.0, why=graphs.get("error", "")))
    return found


def _wrapped(cells: Cells) -> list[Reading]:
    name = "wrap/llama-7b"

    def of(key: str) -> Callable[[Any], float]:
        return lambda cell: float(cell["wrapped"][key])

    return [
        _counted(cells, name, "seconds", 5.0, of("seconds")),
        _counted(cells, name, "frozen weights made", 0.0, of("frozen_parameters_materialised")),
    ]


def _on_cuda(cells: Cells) -> list[Reading]:
    name = "layer/d4096-T8192-8x8-k2-bf16"
    limits = {"torch": ("ours:joined", 1.19), "Triton": ("ours:kernels", 1.10)}
    if name not in cells:
        return [Reading(label, None, limit, why="no GPU at hand") for label, (_, limit) in limits.items()]
    return [_ratio(cells, name, "graph", variant, "frozen", limit, label) for label, (variant, limit) in limits.items()]


UNROLLED = {dtype: f"search/unrolled-{dtype}" for dtype in ("fp32", "bf16")}
TARGETS = [
    Target(1, "largest relative error against the naive loop, float64", "≤ 1e-12", _errors),
    Target(
        2,
        "training step ÷ PEFT LoRA of equal rank",
        "≤ 1.00",
        _ratios(_both_dtypes("step/llama"), "step", "ours", "peft", 1.0),
    ),
    Target(3, "peak activation bytes ÷ PEFT, same step", "≤ 1.00", _peaks),
    Target(
        4,
        "layer, forward and backward ÷ frozen, d 2048, T 1024",
        "≤ 1.17",
        _ratios({"bf16": "layer/d2048-T1024-8x8-k2-bf16"}, "forward_backward", "ours", "frozen", 1.17),
    ),
    Target(
        5,
        "the same at d 4096, T 512",
        "≤ 1.06",
        _ratios({"bf16": "layer/d4096-T512-8x8-k2-bf16"}, "forward_backward", "ours", "frozen", 1.06),
    ),
    Target(6, "mixed ÷ uniform ranks of equal sum", "≤ 1.02", _mixed),
    Target(7, "own choice of path ÷ the better one", "≤ 1.05", _regrets),
    Target(8, "search: first-order pair ÷ plain step, same tokens", "≤ 1.02 fp32, ≤ 1.05 bf16", _first_order),
    Target(9, "search: unrolled pair ÷ plain step", "≤ 3.0", _ratios(UNROLLED, "step", "pair", "plain", 3.0)),
    Target(10, "whole default search ÷ second stage", "≤ 0.25", _whole),
    Target(11, "extra operations per adapted linear at decode", "≤ 8, and 0 data-dependent", _decode_counts),
    Target(
        12,
        "one-token decode ÷ frozen",
        "≤ 1.25",
        _ratios({"bf16": "decode/llama-bf16"}, "decode", "ours", "frozen", 1.25),
    ),
    Target(
        13,
        "clipping and optimiser ÷ PEFT",
        "≤ 1.06",
        _ratios(_both_dtypes("update/llama"), "update", "ours", "peft", 1.06),
    ),
    Target(14, "graph breaks and recompilations over 5 token counts", "0", _compiled),
    Target(15, "wrapping a 7B model without weights", "≤ 5 s, none made", _wrapped),
    Target(16, "CUDA layer 4096 → 4096, T 8192 ÷ frozen, kernels alone", "≤ 1.19 torch, ≤ 1.10 Triton", _on_cuda),
]


def by_name(cells: Sequence[Mapping[str, Any]]) -> Cells:
    return {cell["name"]: cell for cell in cells}
