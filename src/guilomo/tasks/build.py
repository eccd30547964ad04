"""From a `TaskConfig` to a task: loads, divides and tokenises."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from transformers import PreTrainedTokenizerBase

from ..errors import GuilomoError, invalid
from .collate import Collator, padding_id
from .config import TaskConfig
from .digest import digest
from .load import load_documents, load_examples, task_name
from .mixed import mixed
from .schema import Example
from .split import fraction_count
from .task import SPLITS, Task
from .templates import resolve_template
from .tokenize import TokenRow, block_rows, classification_rows, prompt_rows, required_lengths, text_blocks


def build_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Loads, divides and tokenises the data that `config` describes; several tasks are made one, see `mixed`.

    Raises:
        GuilomoError: the data cannot be read, do not fit the kind of task, or do not fit into `max_length`.
    """
    if config.parts:
        return mixed(config, [build_task(part, tokenizer) for part in config.part_configs()])
    if config.kind == "lm":
        return _language_task(config, tokenizer)
    examples = load_examples(config)
    if config.kind == "causal_lm":
        for split in SPLITS:
            examples[split] = _fitting(tokenizer, examples[split], config, split)
    labels = _class_names(examples) if config.kind == "classification" else None
    rows: dict[str, list[TokenRow]] = {}
    truncated = {}
    template = resolve_template(config.template)
    for split in SPLITS:
        if config.kind == "classification":
            made = classification_rows(tokenizer, examples[split], config.max_length)
        else:
            made = prompt_rows(tokenizer, examples[split], template, config.max_length, config.append_eos)
        rows[split], truncated[split] = made
    canonical = {split: [asdict(example) for example in examples[split]] for split in SPLITS}
    return _assemble(config, tokenizer, labels, rows, examples, truncated, digest(canonical))


def _fitting(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], config: TaskConfig, split: str
) -> list[Example]:
    """The examples whose answers fit into `max_length`; the others stop the run, or are dropped with a warning."""
    needed = required_lengths(tokenizer, examples, config.append_eos)
    kept = [example for example, length in zip(examples, needed, strict=True) if length <= config.max_length]
    lost = len(examples) - len(kept)
    if not lost:
        return examples
    if not config.drop_too_long or not kept:
        allowed = f"at least {max(needed)}: the answers of {lost} of {len(examples)} {split} rows do not fit"
        remedy = "Raise it as far as the model allows, or set drop_too_long."
        raise invalid("max_length", config.max_length, allowed, remedy)
    warnings.warn(
        f"{lost} of {len(examples)} {split} rows of {task_name(config)!r} were left out: their answers are longer than "
        f"max_length = {config.max_length} (the longest needs {max(needed)}).",
        stacklevel=3,
    )
    return kept


def _language_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Contiguous parts of the text, in the order train, held-out, test, unless files give them apart."""
    documents = load_documents(config)
    blocks = {
        split: None if found is None else text_blocks(tokenizer, found, config.max_length)
        for split, found in documents.items()
    }
    train = blocks["train"] or []
    held_out, test = blocks["held_out"], blocks["test"]
    remedy = f"source = {config.source!r} gives too little text: shorten max_length = {config.max_length} or add text."
    if test is None:
        count = fraction_count(len(train), config.test_fraction, "test blocks", remedy)
        train, test = train[: len(train) - count], train[len(train) - count :]
    train, test = train[: config.train_size], test[: config.test_size]
    if held_out is None:
        count = fraction_count(len(train), config.held_out_fraction, "held-out blocks", remedy)
        train, held_out = train[: len(train) - count], train[len(train) - count :]
    parts = dict(zip(SPLITS, (train, held_out, test), strict=True))
    if not train or not test:
        raise GuilomoError(remedy)
    rows: dict[str, list[TokenRow]] = {}
    for split in SPLITS:
        rows[split] = block_rows(parts[split], first=sum(map(len, rows.values())))
    nothing: dict[str, list[Example]] = {split: [] for split in SPLITS}
    return _assemble(config, tokenizer, None, rows, nothing, dict.fromkeys(SPLITS, 0), digest(parts))


def _class_names(examples: Mapping[str, Sequence[Example]]) -> list[str]:
    """The label names, which all rows must share.

    Raises:
        GuilomoError: rows without classes, rows with names of their own, or only one class to learn from.
    """
    names = examples["train"][0].choices
    for example in (row for split in SPLITS for row in examples[split]):
        if example.type != "cls" or example.choices != names or names is None:
            found = example.type if example.type != "cls" else example.choices
            allowed = f"rows of type 'cls' that share one list of label names ({names})"
            remedy = "Use kind: causal_lm for multiple choice and free answers."
            raise invalid(f"example {example.id!r}", found, allowed, remedy)
    seen = {example.label for example in examples["train"]}
    if len(seen) < 2:
        only = examples["train"][0].answer
        raise invalid("classes among the training rows", only, "at least two classes", "Use more or other rows.")
    return list(names or ())


def _assemble(
    config: TaskConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: list[str] | None,
    rows: dict[str, list[TokenRow]],
    examples: dict[str, list[Example]],
    truncated: dict[str, int],
    data_hash: str,
) -> Task:
    return Task(
        name=task_name(config),
        kind=config.kind,
        labels=labels,
        train=rows["train"],
        held_out=rows["held_out"],
        test=rows["test"],
        examples=examples,
        truncated=truncated,
        data_hash=data_hash,
        tokenizer=tokenizer,
        config=config,
        collator=Collator(padding_id(tokenizer), config.pad_to_multiple_of, config.max_length),
    )
