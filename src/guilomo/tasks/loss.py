"""Cross-entropy per row, the one loss that training, search and evaluation share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def row_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, in nats, accumulated in float32.

    Args:
        logits: `(B, C)` for classification, `(B, T, V)` for language models.
        labels: `(B,)` class indices, or `(B, T)` token ids with -100 where there is nothing to predict.
            Logits at position t are compared with the label at t + 1.

    Returns:
        `(loss_sum, count)`, each `(B,)`: the sum over the row's predictions (float32), and how many they are
        (int64).
    """
    if logits.dim() == 2:
        loss = functional.cross_entropy(logits.float(), labels, reduction="none")
        return loss, torch.ones_like(labels)
    targets = labels[:, 1:]
    flat = logits[:, :-1].float().flatten(0, 1)
    loss = functional.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return loss.view(targets.shape).sum(dim=1), (targets != IGNORED).sum(dim=1)
