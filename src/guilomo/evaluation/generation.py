"""Greedy generation in batches, with every decoding choice made explicit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from ..errors import invalid
from ..tasks import Example, Task
from ..tasks.templates import completion, resolve_template
from ..tasks.tokenize import answer_ids, fit_prompt, prompt_ids
from ..tuner import tasks_given
from .forward import Progress, batches_by_length, device_of

SLACK = 8  # tokens beyond the longest reference answer


def generate_answers(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The greedily generated continuation of each example's prompt, without special tokens.

    Args:
        model: a causal language model in evaluation mode (see `evaluating`).
        task: gives tokenizer, template and `max_length`, which prompt and answer together may not exceed.
        examples: what to answer.
        batch_size: prompts per batch.
        max_new_tokens: longest answer; by default the longest reference answer of `examples` plus 8, at most half of
            `max_length`.
        progress: called with (rows done, rows in all).

    Raises:
        GuilomoError: max_new_tokens leaves no room for a prompt.
    """
    limit = _answer_limit(task, examples) if max_new_tokens is None else max_new_tokens
    if limit < 1:
        raise invalid("max_new_tokens", limit, "a number of at least 1")
    prompts = _prompts(task, examples, limit)
    settings = _settings(model, task, limit)
    answers = [""] * len(examples)
    done = 0
    for batch in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        tasks = _task_ids(task, [examples[index] for index in batch], device_of(model))
        with tasks_given(model, tasks):
            texts = _generate_batch(model, task, [prompts[index] for index in batch], settings)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text
        done += len(batch)
        if progress is not None:
            progress(done, len(examples))
    return answers


def _task_ids(task: Task, examples: Sequence[Example], device: torch.device) -> Tensor | None:
    """``(B,)`` tasks of rows of a mixed task; None for a single one."""
    return torch.tensor([task.task_id(example) for example in examples], device=device) if task.parts else None


def _answer_limit(task: Task, examples: Sequence[Example]) -> int:
    longest = max(len(answer_ids(task.tokenizer, completion(example), eos=True)) for example in examples)
    return min(longest + SLACK, task.config.max_length // 2)


def _prompts(task: Task, examples: Sequence[Example], limit: int) -> list[list[int]]:
    template = resolve_template(task.config.template)
    return [
        fit_prompt(
            task.tokenizer,
            prompt_ids(task.tokenizer, example, template),
            limit,
            task.config.max_length,
            example.id,
        )
        for example in examples
    ]


def _settings(model: nn.Module, task: Task, limit: int) -> GenerationConfig:
    """Greedy search. Whatever a checkpoint's own generation settings ask for is overridden, not inherited."""
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=limit,
        min_new_tokens=0,
        use_cache=True,
        eos_token_id=_end_ids(model, task) or None,
        pad_token_id=task.collator.pad_id,
    )


def _end_ids(model: nn.Module, task: Task) -> list[int]:
    """End tokens of the tokenizer and of the model's own settings, which may name several."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in [task.tokenizer.eos_token_id, *listed] if token is not None})


def _generate_batch(model: nn.Module, task: Task, prompts: list[list[int]], settings: GenerationConfig) -> list[str]:
    """Prompts are padded on the left, so that every answer starts right behind its prompt."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    pad = task.collator.pad_id
    ids = torch.tensor([[pad] * gap + prompt for gap, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in padding])
    device = device_of(model)
    found = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    texts: list[str] = task.tokenizer.batch_decode(found[:, width:].tolist(), skip_special_tokens=True)
    return texts
