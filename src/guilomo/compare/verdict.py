"""What a comparison's numbers say and do not say, in plain sentences."""

from __future__ import annotations

from typing import Any

from guilomo.run.compare import NOUNS, listed, sweep_notes

ALPHA = 0.05
FEW_SEEDS = 3


def verdict(results: dict[str, Any]) -> list[str]:
    """Sentences on a compare.json; the first says what is better than plain LoRA beyond noise, or that nothing is."""
    return [
        *_against_reference(results),
        *_over_tasks(results),
        *_left_out(results),
        *_few_seeds(results),
        *_failed(results),
        *_edges(results),
    ]


def _against_reference(results: dict[str, Any]) -> list[str]:
    counted = {task["name"] for task in results["tasks"] if task["above_chance"] is not False}
    tests = [test for test in results["tests"] if test["task"] in counted]
    reference = _label(results, results["reference"])
    if not counted:
        return ["Nothing is better than chance on any task, so no method can be told from another."]
    if not tests:
        return [f"Nothing is tested against {reference} yet."]
    better, worse = (_claims(results, tests, reference, won) for won in (True, False))
    out = [*(better or [f"No method is better than {reference} beyond noise on any task."]), *worse]
    if not better and not worse:
        out.append("These results cannot tell any of them apart from it either way; that is not a proof of equality.")
    return out


def _claims(results: dict[str, Any], tests: list[dict[str, Any]], reference: str, won: bool) -> list[str]:
    """A sentence for each metric and set of tasks on which methods win, or lose, by significant tests."""
    who: dict[tuple[str, str], list[str]] = {}
    for metric, noun in NOUNS.items():
        for method in results["methods"]:
            sure = [t for t in tests if t["method"] == method["name"] and t["metric"] == metric]
            sure = [t for t in sure if t["p_corrected"] < ALPHA and t["difference"] != 0]
            names = [t["task"] for t in sure if ((t["difference"] < 0) == (metric == "loss")) == won]
            if names:
                who.setdefault((noun, listed(names)), []).append(_label(results, method["name"]))
    way = "better" if won else "worse"
    return [
        f"{listed(labels)} {'has' if len(labels) == 1 else 'have'} {way} {noun} than {reference} on {where} "
        f"(Holm-corrected p < {ALPHA})."
        for (noun, where), labels in who.items()
    ]


def _over_tasks(results: dict[str, Any]) -> list[str]:
    """The test over all blocks; who is apart from plain LoRA by it."""
    found = results["friedman"]
    if found is None:
        return []
    said = f"Over {found['n_blocks']} blocks (tasks × seeds), Friedman's test gives p = {found['p']:.2g}"
    if found["p"] >= ALPHA:
        return [f"{said}: the methods' ranks do not differ beyond noise."]
    mean_ranks = found["mean_ranks"]
    plain = mean_ranks.get(results["reference"])
    apart = [
        _label(results, name)
        for name, rank in mean_ranks.items()
        if plain is not None and abs(rank - plain) > found["critical_difference"]
    ]
    end = f"{listed(apart)} by more than that from plain LoRA" if apart else "none by more than that from plain LoRA"
    return [f"{said}; mean ranks differ where they are {found['critical_difference']:.2f} apart, {end}."]


def _left_out(results: dict[str, Any]) -> list[str]:
    names = [task["name"] for task in results["tasks"] if task["above_chance"] is False]
    if not names:
        return []
    it = "it is" if len(names) == 1 else "they are"
    return [f"No row is above chance on {listed(names)}; {it} left out of this verdict and of the mean ranks."]


def _few_seeds(results: dict[str, Any]) -> list[str]:
    seeds = len(results["seeds"])
    if seeds >= FEW_SEEDS:
        return []
    runs = "one training" if seeds == 1 else f"{seeds} trainings"
    return [f"Each method has {runs} per task; that says little about the luck of training: use {FEW_SEEDS} seeds."]


def _failed(results: dict[str, Any]) -> list[str]:
    out = []
    if count := len(results["failures"]):
        word = "cell" if count == 1 else "cells"
        out.append(f"{count} {word} failed; see failures for the reasons, and --retry-failed to try again.")
    missing = sum(
        cell["status"] == "missing" for m in results["methods"] for t in m["tasks"].values() for cell in t["cells"]
    )
    if missing:
        out.append(f"{missing} {'cell is' if missing == 1 else 'cells are'} not done yet; all of this is provisional.")
    return out


def _edges(results: dict[str, Any]) -> list[str]:
    rows = [
        {"label": f"{method['label']} on {task}", "sweep": entry["sweep"]}
        for method in results["methods"]
        for task, entry in method["tasks"].items()
    ]
    return sweep_notes(rows)


def _label(results: dict[str, Any], name: str) -> str:
    return str(next(method["label"] for method in results["methods"] if method["name"] == name))
