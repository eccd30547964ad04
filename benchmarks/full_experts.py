"""Makes the experts that benchmarks/comparisons/flexmore-stories.yaml starts from. Needs GUILOMO_DATA.

    python -m benchmarks.full_experts comparisons/experts

From one small decoder, its feed-forwards alone are trained in full on each of three texts, as FlexOlmo's experts are.
Writes comparisons/experts/{reviews,wikitext,shakespeare}, each a model folder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, Trainer
from transformers.utils import logging

from guilomo.evaluation import evaluate
from guilomo.run.config import ModelConfig
from guilomo.run.model import load_model, load_tokenizer
from guilomo.sparse_moe import feed_forwards
from guilomo.tasks import Task, TaskConfig, build_task
from guilomo.training import TrainConfig, training_arguments

MODEL = ModelConfig(path="$GUILOMO_DATA/models/stories260K", device="cpu")
TEXTS = {
    "reviews": "movie_reviews_2000.jsonl.xz",
    "wikitext": "wikitext2_valid.txt.xz",
    "shakespeare": "tinyshakespeare.txt.xz",
}
TRAIN = TrainConfig(epochs=2, batch_size=8, learning_rate=3e-3, save_every=10**6)
"""The rate is the best of 3e-4, 1e-3, 3e-3 and 1e-2 on held-out rows, for each of the texts."""
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains one full expert on each of three texts.")
    parser.add_argument("output", type=Path, help="folder for the folders of the experts")
    output = parser.parse_args().output
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums are then the same on every run
    tokenizer = load_tokenizer(MODEL)
    for name, file in TEXTS.items():
        task = build_task(lm_task(name, file), tokenizer)
        model = load_model(MODEL, task, SEED)
        before = loss(model, task)
        train(model, task, TRAIN, [*task.train, *task.held_out])
        print(f"{name}: test loss {before:.3f} as loaded, {loss(model, task):.3f} trained on", flush=True)
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)


def lm_task(name: str, file: str) -> TaskConfig:
    """Blocks of a text."""
    source = f"$GUILOMO_DATA/text/{file}"
    return TaskConfig(name=name, kind="lm", source=source, max_length=128, train_size=600, test_size=100)


def train(model: nn.Module, task: Task, config: TrainConfig, rows: list[dict[str, object]]) -> None:
    """Trains the weights of the feed-forwards' linears, and nothing else."""
    model.requires_grad_(False)
    for linears in feed_forwards(model).values():
        for linear in linears:
            model.get_parameter(f"{linear}.weight").requires_grad_(True)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(config, Path(scratch), SEED, use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=task.collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def loss(model: nn.Module, task: Task, split: str = "test") -> float:
    """Nats per token."""
    return evaluate(model, task, split).metrics["loss"].value


if __name__ == "__main__":
    main()
