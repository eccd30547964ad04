"""Writes docs/speed.md and docs/speed.png from benchmarks/results/speed/*.json.

    python -m benchmarks.speed.page

Every file is a run on one machine; NAME-again.json repeats NAME.json on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.agreement import compare
from benchmarks.speed.figure import write_figure
from benchmarks.speed.notes import NOTES
from benchmarks.speed.report import shown
from benchmarks.speed.targets import NOT_RUN, TARGETS, better_path, by_name, regret

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "speed"
PAGE = ROOT / "docs" / "speed.md"
AGAIN = "-again"
Results = Mapping[str, Any]

HEAD = """# What a mixture costs

A mixture of LoRA experts beside the frozen model, plain LoRA of the same total rank, and three other ways to compute
the same mixture. All are timed in one process, in rounds: every round runs each variant once, in rotated order. A
figure is the median over rounds of a ratio taken within the round; brackets are a 95 % interval of that median from
order statistics (with fewer than 6 rounds, the whole range). Rounds during which other work ran are thrown away: the
system is asked how long the threads of the process waited for a core and how long others used one. Where too few
rounds were undisturbed, the least disturbed are kept and the figure is marked *noisy*. Kernels, data-dependent
operations and bytes are counted, and depend neither on the clock nor on the load.

![Forward and backward of one layer, and a training step](speed.png)

| variant | |
| --- | --- |
| frozen | the model without adapters, backward down to its input: the limit |
| peft | plain LoRA through PEFT, its rank the sum of the experts' ranks |
| ours | this library, the path chosen by itself; `ours:packed`, `ours:fused` and so on: held to one path |
| ours+balance | the same with the balance loss of the default config; `ours` and all others have none |
| sparse_loop | expert by expert: find its tokens, gather, two products, `index_add_`, as research code does |
| dense_einsum | every expert computes every token; the weights sum a (tokens, experts, outputs) tensor |
| grouped_gemm | (token, expert) pairs sorted by expert, `grouped_mm` over the groups, ranks filled up to the largest |

The last three were written for this benchmark from their descriptions and give the same outputs and gradients; they
are not the released code of any project. They compute router scores in the dtype of the model, which is cheaper than
the float32 of ours.
"""


def page(files: Mapping[str, Results]) -> str:
    """The whole page, from results by the name of their file."""
    parts = [HEAD]
    for name, results in files.items():
        if not name.endswith(AGAIN):
            parts.append(_run(name, results, files.get(name + AGAIN)))
    return "\n".join(parts)


def _run(name: str, results: Results, again: Results | None) -> str:
    cells = by_name(results["cells"])
    sections = [
        _heading(results),
        _targets(results),
        NOTES.get(name, ""),
        _layers(results["cells"], "forward_backward", "Layer, forward and backward ÷ frozen"),
        _layers(results["cells"], "forward", "Layer, forward ÷ frozen"),
        _layers(results["cells"], "graph", "Layer, forward and backward ÷ frozen, kernels alone"),
        _layer_memory(results["cells"]),
        _steps(results["cells"]),
        _decode(results["cells"]),
        _search(results["cells"]),
        _choice(results["cells"]),
        _whole(cells),
        _failures(results["cells"]),
        "" if again is None else _agreement(results, again),
        _made(name, results),
    ]
    return "\n".join(section for section in sections if section)


def _heading(results: Results) -> str:
    hardware = results["hardware"]
    gpu = f", {hardware['gpu']}" if results["setting"]["device"] == "cuda" else ""
    threads = "1 thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"
    flags = ", ".join(hardware["flags"])
    return f"## {hardware['cpu']}{gpu}\n\n{hardware['cores']} cores, {threads} ({flags}).\n"


def _targets(results: Results) -> str:
    cells = by_name(results["cells"])
    lines = []
    for target in TARGETS:
        verdict, readings = target.verdict(cells)
        if all(reading.why == NOT_RUN for reading in readings):
            continue
        readings = [reading for reading in readings if reading.why != NOT_RUN]
        found = "; ".join(f"{r.label}: {shown(r)}" for r in readings if r.value is not None or r.why)
        word = f"**{verdict}**" if verdict == "missed" else verdict
        lines.append(f"| {target.number} | {target.what} | {target.wanted} | {found} | {word} |")
    return "\n".join(
        ["### Targets", "", "| # | what | target | measured | |", "| ---: | --- | --- | --- | --- |", *lines, ""]
    )


def _of_kind(cells: Sequence[Results], kind: str) -> list[Results]:
    return [cell for cell in cells if cell["kind"] == kind and "error" not in cell]


def _table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]], after: str = "") -> str:
    columns, rows = list(columns), list(rows)
    if not rows:
        return ""
    lines = [f"### {title}", "", f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *([after, ""] if after else [])])


def _variants(cells: Sequence[Results], time: str) -> list[str]:
    found = dict.fromkeys(v for cell in cells for v in cell["times"][time]["ratios"])
    return [v for v in found if v != "frozen"]


def _ratio(timing: Results, variant: str) -> str:
    found = timing["ratios"].get(variant)
    if found is None:
        return "–"
    half = (found["high"] - found["low"]) / 2
    return f"{found['median']:.2f} ± {half:.2f}"


def _name(cell: Results, timing: Results) -> str:
    return cell["name"].partition("/")[2] + (" (noisy)" if timing["noisy"] else "")


def _layers(cells: Sequence[Results], time: str, title: str) -> str:
    layers = [cell for cell in _of_kind(cells, "layer") if time in cell["times"]]
    variants = _variants(layers, time)
    rows = [
        [
            _name(cell, cell["times"][time]),
            _milliseconds(cell["times"][time], "frozen"),
            *(_ratio(cell["times"][time], v) for v in variants),
        ]
        for cell in layers
    ]
    after = (
        "d: inputs and outputs; T: tokens; experts × rank, or mixed with the sum R; k: experts per token. ± is half of "
        "the interval."
    )
    return _table(title, ["layer", "frozen ms", *variants], rows, after)


def _milliseconds(timing: Results, variant: str) -> str:
    samples = sorted(timing["samples"][variant])
    milliseconds = 1e3 * samples[len(samples) // 2]
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _layer_memory(cells: Sequence[Results]) -> str:
    layers = _of_kind(cells, "layer")
    variants = list(dict.fromkeys(v for cell in layers for v in cell["counts"]))

    def both(counted: Results | None) -> str:
        if counted is None:
            return "–"
        return f"{counted['saved_bytes'] / 1e6:.2f} / {counted['peak_bytes'] / 1e6:.2f}"

    rows = [[cell["name"].partition("/")[2], *(both(cell["counts"].get(v)) for v in variants)] for cell in layers]
    after = "Saved without the input, which every adapter needs; the peak has the output and all gradients in it."
    return _table("Layer, MB saved for the backward / at the peak", ["layer", *variants], rows, after)


def _steps(cells: Sequence[Results]) -> str:
    steps, updates = _of_kind(cells, "step"), _of_kind(cells, "update")
    parts = []
    for cell in steps:
        timing = cell["times"]["step"]
        rows = [
            [
                variant,
                _milliseconds(timing, variant),
                _ratio(timing, variant),
                f"{counted['peak_bytes'] / 1e6:.1f}",
                f"{counted['peak_bytes'] / cell['counts']['peft']['peak_bytes']:.3f}",
                f"{counted['forward_backward']['kernels']:,}",
                f"{counted['forward_backward']['data_dependent']:,}",
                f"{counted['trained_tensors']:,}",
            ]
            for variant, counted in cell["counts"].items()
        ]
        columns = ["variant", "ms", "÷ peft", "peak MB", "÷ peft", "kernels", "data-dependent", "tensors"]
        size = f"{cell['options']['rows']} × {cell['options']['length']} tokens"
        parts.append(_table(f"Training step, {_name(cell, timing)}, {size}", columns, rows))
    rows = [
        [_name(cell, cell["times"]["update"]), *(_ratio(cell["times"]["update"], v) for v in ("ours", "sparse_loop"))]
        for cell in updates
    ]
    parts.append(_table("Clipping and optimiser ÷ PEFT", ["model", "ours", "sparse_loop"], rows))
    return "\n".join(part for part in parts if part)


def _decode(cells: Sequence[Results]) -> str:
    parts = []
    for cell in _of_kind(cells, "decode"):
        decode, prefill = cell["times"]["decode"], cell["times"]["prefill"]
        rows = [
            [
                variant,
                _milliseconds(decode, variant),
                _ratio(decode, variant),
                _ratio(prefill, variant),
                f"{counted['extra_kernels_per_linear']:g}",
                f"{counted['data_dependent_per_linear']:g}",
            ]
            for variant, counted in cell["counts"].items()
        ]
        columns = ["variant", "ms per token", "token ÷ frozen", "prompt ÷ frozen", "kernels", "data-dependent"]
        options = cell["options"]
        parts.append(
            _table(
                f"Generation, {_name(cell, decode)}",
                columns,
                rows,
                f"One row, a cache of {options['cached']} tokens, a prompt of {options['prompt']}; eager. Kernels and "
                "data-dependent operations are those beyond the frozen model's, per adapted linear and token.",
            )
        )
    return "\n".join(parts)


def _search(cells: Sequence[Results]) -> str:
    rows = [
        [_name(cell, cell["times"]["step"]), _ratio(cell["times"]["step"], "pair"), cell["options"]["note"]]
        for cell in _of_kind(cells, "search")
    ]
    return _table("Search, pair of steps ÷ plain step", ["search", "ratio", "tokens that are counted"], rows)


def _choice(cells: Sequence[Results]) -> str:
    rows = []
    for cell in _of_kind(cells, "choice"):
        timing = cell["times"]["forward_backward"]
        rows.append(
            [
                _name(cell, timing),
                f"{sum(cell['options']['ranks'])}",
                _ratio(timing, "ours:sorted"),
                better_path(timing).partition(":")[2],
                f"{regret(timing)['median']:.2f}",
            ]
        )
    columns = ["layer", "R", "sorted ÷ joined", "better", "own choice ÷ better"]
    return _table("The layer's own choice of path", columns, rows)


def _whole(cells: Results) -> str:
    cell = cells.get("whole/stories260K")
    if cell is None or "error" in cell:
        return ""
    whole = cell["whole"]
    return (
        "### Whole search and second stage\n\n"
        f"By their default configs a search is worth {whole['search_in_training_steps']:.0f} training steps, whatever "
        f"the task. Beside a second stage of {cell['options']['rows']:,} rows ({whole['training_steps']:.0f} steps) "
        f"that is {whole['ratio']:.2f}; it is a quarter from {whole['rows_for_a_quarter']:,} rows on. Extrapolated "
        f"from steps of {cell['options']['model']}, timed in the same rounds.\n"
    )


def _failures(cells: Sequence[Results]) -> str:
    failed = [f"- {cell['name']}: {cell['error']}" for cell in cells if "error" in cell]
    return "\n".join(["### Cells that were not measured", "", *failed, ""]) if failed else ""


def _agreement(first: Results, again: Results) -> str:
    """Whether a second run confirms the first."""
    found = compare(first["cells"], again["cells"])
    sure = [ratio for ratio in found if not ratio.noisy]
    within, overlap = sum(ratio.within for ratio in sure), sum(ratio.agrees for ratio in sure)
    outside = [f"| {r.name} | {r.first} | {r.again} |" for r in sure if not r.agrees]
    lines = [
        "### The same again",
        "",
        f"Of {len(sure)} ratios that neither run marks as noisy, {within} have their second median within the first "
        f"interval, and {overlap} have intervals that overlap; those that have not are listed. "
        f"{len(found) - len(sure)} are marked as noisy.",
        "",
    ]
    if outside:
        lines += ["| ratio | first | again |", "| --- | ---: | ---: |", *outside, ""]
    return "\n".join(lines)


def _made(name: str, results: Results) -> str:
    versions = ", ".join(
        f"{package} {results['versions'][package]}"
        for package in ("python", "torch", "transformers", "peft", "guilomo")
    )
    return (
        "### How it was made\n\n"
        f"`{results['command']}` at commit {results['commit']} on {results['made']}, seed "
        f"{results['setting']['seed']}; {versions}. The numbers, every sample included, are in "
        f"`{FOLDER.relative_to(ROOT).as_posix()}/{name}.json`; this page and its picture come from "
        "`python -m benchmarks.speed.page`.\n"
    )


def stored() -> dict[str, Results]:
    """The committed runs by the name of their file, the largest first."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(FOLDER.glob("*.json"), key=lambda p: p.stat().st_size, reverse=True)
    }


if __name__ == "__main__":
    FILES = stored()
    PAGE.write_text(page(FILES), encoding="utf-8")
    write_figure(max(FILES.values(), key=lambda results: len(results["cells"])), PAGE.with_suffix(".png"))
