"""The README's code runs as printed, on a tiny model and with a budget to match."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from benchmarks import recipe_results, regimes_page
from guilomo.run import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def load_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **size))


def collator(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(2, 50, (count, 6), generator=torch.Generator().manual_seed(count))
    return [{"input_ids": row, "labels": (row[0] > 25).long()} for row in ids]


def test_code_blocks_run(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    names = {
        "load_model": load_model,
        "collator": collator,
        "train_rows": make_rows(40),
        "held_out_rows": make_rows(20),
        "args": args,
        "Trainer": Trainer,
    }
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        smaller = block.replace("400_000", "6_000").replace("steps=300", "steps=40")
        assert smaller != block
        exec(compile(smaller, "README.md", "exec"), names)
    assert names["found"].allocation.parameters() <= 6_000
    assert names["plan"].parameters() <= 6_000
    names["trainer"].train()


def test_recipes_and_files_that_are_named_exist() -> None:
    for recipe in set(re.findall(r"recipes/\w+\.yaml", README)):
        load_recipe(ROOT / recipe)
    for target in re.findall(r"\]\((docs/[\w.]+)\)", README):
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("made", [recipe_results, regimes_page], ids=["results", "regimes"])
def test_results_pages_are_those_the_result_files_give(made: Any) -> None:
    assert made.PAGE.read_text(encoding="utf-8") == made.page()


def test_planted_numbers_are_those_of_the_result_file() -> None:
    """Every row of the README's table against benchmarks/results/planted.json."""
    found = json.loads((ROOT / "benchmarks" / "results" / "planted.json").read_text(encoding="utf-8"))["summary"]
    rows = {
        "ranks, residual network": "residual-ranks",
        "ranks, small Llama": "transformer-ranks",
        "expert counts, residual network": "residual-experts",
    }
    for label, world in rows.items():
        guilomo, random, code = (found[world]["spearman"][name] for name in ("guilomo", "random", "authors_code"))
        shown = [f"{s['value']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in (guilomo, code)]
        mean = round(random["value"], 2) + 0.0  # no "-0.00"
        assert f"| {label} | {shown[0]} | {mean:.2f} | {shown[1]} |" in README


@pytest.mark.parametrize(("label", "file"), [("novels", "regimes/novels-1120"), ("Shakespeare", "recipes/shakespeare")])
def test_losses_on_text_are_those_of_the_result_files(label: str, file: str) -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8"))
    losses = {method["name"]: method["summary"]["loss"]["mean"] for method in found["methods"]}
    shown = [f"{losses[name]:.3f}" for name in ("guilomo", "lora-qv", "random", "shuffled")]
    (lead,) = (t for t in found["tests"] if t["b"] == "lora-qv" and t["metric"] == "loss")
    shown.append(f"{lead['difference']:.3f} [{lead['low']:.3f}, {lead['high']:.3f}]")
    assert f"| {label} | {' | '.join(shown)} |" in README
    assert len(found["methods"][0]["runs"]) == 5
