"""From token rows to padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .loss import IGNORED


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills short rows: the pad token, else the end token, else 0; the attention mask hides
    it.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right and stacks them.

    Attributes:
        pad_id: fills `input_ids`.
        multiple: lengths are rounded up to a multiple of this, but not above `max_length`.
        max_length: longest row, in tokens.
    """

    pad_id: int
    multiple: int
    max_length: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` `(B, T)`, `labels` `(B,)` or `(B, T)`, and `token_type_ids` `(B, T)` and
        `router_task_ids` `(B,)` if rows have them.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        rounded = -(-longest // self.multiple) * self.multiple
        # Rounding must not push a row beyond the longest input the model was promised.
        width = max(longest, min(rounded, self.max_length))
        batch = {
            "input_ids": _pad([row["input_ids"] for row in rows], width, self.pad_id),
            "attention_mask": _pad([row["attention_mask"] for row in rows], width, 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = _pad([row["token_type_ids"] for row in rows], width, 0)
        if "router_task_ids" in rows[0]:
            batch["router_task_ids"] = torch.tensor([row["router_task_ids"] for row in rows])
        if isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        else:
            batch["labels"] = _pad([row["labels"] for row in rows], width, IGNORED)
        return batch


def _pad(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
