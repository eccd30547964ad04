"""From text to token ids: texts and pairs with a class, prompts with an answer, and running text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import GuilomoError, invalid
from .loss import IGNORED
from .schema import Document, Example
from .templates import completion, render_prompt

TokenRow = dict[str, Any]
"""input_ids, attention_mask (lists of ints), labels (int or list of ints), example (id), maybe token_type_ids."""

PIECE = 1_000_000  # characters given to the tokenizer at once


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text without special tokens; long texts raise no warning."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text for a language model: `[bos]` or nothing.

    Only the beginning-of-sequence token counts: an end token that some tokenizers also add would stand between prompt
    and answer.
    """
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def classification_rows(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> tuple[list[TokenRow], int]:
    """Token rows with a class each, and how many texts were cut at `max_length`.

    A pair goes to the tokenizer as a pair if it has a separator token, else as two lines. Of a pair that is too long
    the longer text is cut first.
    """
    rows: list[TokenRow] = []
    cut = 0
    for example in examples:
        if example.input2 is not None and tokenizer.sep_token_id is not None:
            encoded = tokenizer(example.input, example.input2, verbose=False)
            texts: tuple[str, ...] = (example.input, example.input2)
        else:
            texts = (example.full_input,)
            encoded = tokenizer(example.full_input, verbose=False)
        if len(encoded["input_ids"]) > max_length:
            cut += 1
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        row = {"input_ids": encoded["input_ids"], "attention_mask": [1] * len(encoded["input_ids"])}
        if "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in encoded:
            row["token_type_ids"] = encoded["token_type_ids"]
        if not row["input_ids"]:
            raise GuilomoError(
                f"example {example.id!r}: the text {example.full_input!r} gives no tokens. Remove the row."
            )
        rows.append({**row, "labels": example.label, "example": example.id})
    return rows, cut


def prompt_rows(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], template: str, max_length: int, eos: bool
) -> tuple[list[TokenRow], int]:
    """Token rows of prompt and answer with the loss on the answer only, and how many prompts were cut.

    Raises:
        GuilomoError: an answer alone does not fit into `max_length`.
    """
    rows: list[TokenRow] = []
    cut = 0
    for example in examples:
        prompt = prompt_ids(tokenizer, example, template)
        answer = answer_ids(tokenizer, completion(example), eos)
        if not answer:
            raise invalid(f"example {example.id!r}: answer", example.answer, "an answer that gives at least one token")
        fitted = fit_prompt(tokenizer, prompt, len(answer), max_length, example.id)
        cut += len(fitted) < len(prompt)
        ids = fitted + answer
        labels = [IGNORED] * len(fitted) + answer
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "example": example.id})
    return rows, cut


def required_lengths(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], eos: bool) -> list[int]:
    """The smallest `max_length` each example needs: its whole answer, the start token and one prompt token."""
    start = len(start_ids(tokenizer))
    return [start + 1 + len(answer_ids(tokenizer, completion(example), eos)) for example in examples]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example, template: str) -> list[int]:
    """Ids of the prompt, with the tokenizer's beginning-of-sequence token where it uses one."""
    return start_ids(tokenizer) + encode(tokenizer, render_prompt(template, example))


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str, eos: bool) -> list[int]:
    """Ids of an answer, tokenised apart from the prompt so that the border never falls inside a token.

    Args:
        tokenizer: the tokenizer.
        text: the answer with its leading space.
        eos: add the end-of-sequence token, where the tokenizer has one.
    """
    ids = encode(tokenizer, text)
    if eos and tokenizer.eos_token_id is not None:
        ids = [*ids, int(tokenizer.eos_token_id)]
    return ids


def fit_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], reserved: int, max_length: int, example: str
) -> list[int]:
    """Cuts a prompt from the left (after the beginning-of-sequence token) so that `reserved` more tokens fit.

    The end of the prompt stays, because it holds the question and the cue to answer.

    Raises:
        GuilomoError: not even one prompt token would remain.
    """
    start = start_ids(tokenizer)
    room = max_length - reserved
    if len(prompt) <= room:
        return prompt
    if room <= len(start):
        raise GuilomoError(
            f"max_length = {max_length} is not usable: the answer of example {example!r} alone has {reserved} tokens, "
            f"and at least one prompt token must precede it. Set max_length to {reserved + len(start) + 1} or more."
        )
    return start + prompt[len(prompt) - (room - len(start)) :]


def text_blocks(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], length: int) -> list[list[int]]:
    """Running text cut into blocks of `length` tokens; the last block may be shorter.

    Documents are joined by the beginning-of-sequence token where the tokenizer uses one, else by its end token. Blocks
    that begin inside a document do not get a token of their own in front: to a model that knows it as the start of a
    text it is misleading there (stories260K: 1.94 instead of 1.85 nats per token). A last block of a single token is
    dropped: it has nothing to predict.
    """
    start = start_ids(tokenizer)
    end = [] if start or tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ids: list[int] = []
    for document in documents:
        ids += start
        for piece in _pieces(document.text):
            ids += encode(tokenizer, piece)
        ids += end
    blocks = [ids[index : index + length] for index in range(0, len(ids), length)]
    return [block for block in blocks if len(block) > 1]


def _pieces(text: str) -> list[str]:
    """Cuts a long text behind line ends, since tokenizers slow down and fill memory on very long strings."""
    pieces = []
    while len(text) > PIECE:
        cut = text.rfind("\n", 0, PIECE) + 1 or PIECE
        pieces.append(text[:cut])
        text = text[cut:]
    return [*pieces, text]


def block_rows(blocks: Sequence[list[int]], first: int = 0) -> list[TokenRow]:
    """Token rows of text blocks: every token but the first of a block is predicted; ids count from `first`."""
    return [
        {
            "input_ids": block,
            "attention_mask": [1] * len(block),
            "labels": list(block),
            "example": f"block-{first + index}",
        }
        for index, block in enumerate(blocks)
    ]
