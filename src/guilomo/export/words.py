"""What an export is and what it loses, in plain sentences and as a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORMS = {
    "stacked": "plain LoRA, the experts of a module stacked",
    "svd": "plain LoRA, cut to a rank by SVD",
    "merged": "merged into the weights",
}
"""The ways to export, in words."""


def sentences(report: dict[str, Any]) -> list[str]:
    """What the numbers of an export.json say."""
    found = report["measures"]
    rows = report["measured_on"]
    return [*_origin(report), f"On {rows['rows']} {rows['split']} rows of {rows['task']} {_loss(found)}", _gain(report)]


def _origin(report: dict[str, Any]) -> list[str]:
    rows, said = report["gates_from"], []
    if rows is None:
        said.append("The gates of this mixture are the same for every token: freezing them loses nothing.")
    else:
        said.append(
            f"The gates are means over {rows['rows']} {rows['split']} rows; the mixture's own differ between "
            "tokens, or tasks, which those of one plain LoRA cannot."
        )
    if report["rank"] is not None:
        energy = {name: module["energy"] for name, module in report["modules"].items()}
        least = min(energy, key=lambda name: energy[name])
        said.append(f"Rank {report['rank']} keeps at least {100 * energy[least]:.1f} % of a module's energy ({least}).")
    return said


def _loss(found: dict[str, Any]) -> str:
    added, same = found["loss_added"], 100 * found["agreement"]["value"]
    if added["value"] is None:
        return "a loss is not finite, so that nothing can be said about the difference."
    return (
        f"the export's loss differs from the mixture's by {added['value']:+.4f} nats per prediction"
        f"{_interval(added, '+.4f')}; {same:.1f} % of the predictions are the same."
    )


def _gain(report: dict[str, Any]) -> str:
    found = report["measures"]
    base = "the base model with its untrained head" if report["head_saved"] else "the base model"
    if "gain_kept" not in found:
        return f"On these rows the mixture is not surely better than {base}, so there is no gain to keep a share of."
    kept = found["gain_kept"]
    share = f"{100 * kept['value']:.1f} %{_interval(kept, '.1f', 100)}"
    return f"The export keeps {share} of what the mixture gains over {base}."


def _interval(score: dict[str, Any], form: str, unit: int = 1) -> str:
    if score["low"] is None:
        return ""
    return f" (95 % interval {unit * score['low']:{form}} to {unit * score['high']:{form}})"


def card(report: dict[str, Any], base_model: str | None) -> str:
    """Markdown with the header that the Hub reads."""
    merged = report["to"] == "merged"
    header = ["library_name: transformers", "tags: [guilomo]"] if merged else ["library_name: peft", "tags: [lora]"]
    # A folder of this machine is no name that the Hub knows.
    if base_model and not Path(base_model).exists():
        header.append(f"base_model: {base_model}")
    lines = ["---", *header, "---", "", "# Export of a mixture of LoRA experts", ""]
    lines += [f"Form: {FORMS[report['to']]}. It loads without `guilomo`; `export.json` has all the numbers.", ""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in sentences(report)), ""])
