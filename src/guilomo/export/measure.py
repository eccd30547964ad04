"""What an export loses: routed mixture, export and base model on the same rows, paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from guilomo.evaluation import Score, bootstrap, wilson
from guilomo.evaluation.forward import Progress, batches_by_length, device_of, evaluating
from guilomo.evaluation.metrics import mean_loss
from guilomo.evaluation.statistics import Array
from guilomo.tasks import Task
from guilomo.tasks.loss import IGNORED


@dataclass
class Measurement:
    """Sums over the predictions of each row, ``(N,)`` float64, in row order.

    Attributes:
        predictions: tokens with a label; 1 for classification.
        routed, export, base: loss in nats of the mixture, of its export and of the model without the adapter.
        agreed: predictions whose likeliest class or token is the same for mixture and export.
        divergence: ``KL(routed || export)`` of the predicted distributions, in nats.
    """

    predictions: Array
    routed: Array
    export: Array
    base: Array
    agreed: Array
    divergence: Array

    def scores(self) -> dict[str, Score]:
        """Per prediction, with intervals over the rows; all differences are paired by row.

        ``gain_kept`` is ``(base - export) / (base - routed)``; it is there only where the mixture is surely better than
        the base, since a share of nothing has no meaning.
        """
        gain = mean_loss(self.base - self.routed, self.predictions)
        found = {
            "loss_routed": mean_loss(self.routed, self.predictions),
            "loss_export": mean_loss(self.export, self.predictions),
            "loss_base": mean_loss(self.base, self.predictions),
            "loss_added": mean_loss(self.export - self.routed, self.predictions),
            "gain": gain,
            "agreement": self._agreement(),
            "divergence": mean_loss(self.divergence, self.predictions),
        }
        if gain.low > 0 and np.isfinite(self.export).all():
            found["gain_kept"] = bootstrap(np.stack([self.base - self.export, self.base - self.routed], 1), _share)
        return found

    def _agreement(self) -> Score:
        if (self.predictions == 1).all():
            return wilson(int(self.agreed.sum()), len(self.agreed))
        return mean_loss(self.agreed, self.predictions)


def _share(samples: Array) -> Array:
    kept, all_of_it = samples.sum(axis=1).T
    return np.asarray(kept / all_of_it)


def compare(
    routed: PeftModel,
    export: nn.Module,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Measurement:
    """Runs the mixture, its export and the base model over the same rows, in evaluation mode.

    Args:
        routed: the model with the mixture; the base is the same model with its adapter disabled.
        export: what is to be served instead.
        task: gives collation and loss. rows: token rows of it.
        batch_size: rows per batch; it does not change the numbers beyond rounding.
        progress: called with (rows done, rows in all).

    Raises:
        GuilomoError: batch_size is below 1.
    """
    sums = np.zeros((6, len(rows)))
    done, device = 0, device_of(routed)
    with evaluating(routed), evaluating(export):
        for batch in batches_by_length([len(row["input_ids"]) for row in rows], batch_size):
            inputs = {k: v.to(device) for k, v in task.collate([rows[index] for index in batch]).items()}
            sums[:, batch] = _row_sums(routed, export, task, inputs.pop("labels"), inputs)
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
    return Measurement(*sums)


def _row_sums(routed: PeftModel, export: nn.Module, task: Task, labels: Tensor, inputs: dict[str, Tensor]) -> Array:
    """The fields of a `Measurement` for one batch, ``(6, B)``."""
    with routed.disable_adapter():
        base_loss, _ = task.row_loss(routed(**inputs).logits, labels)
    a, b = routed(**inputs).logits, export(**inputs).logits
    (routed_loss, count), (export_loss, _) = task.row_loss(a, labels), task.row_loss(b, labels)
    owner, a = _predictions(a, labels)
    b = _predictions(b, labels)[1]
    agreed = (a.argmax(-1) == b.argmax(-1)).double()
    divergence = F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1).double()
    per_row = [agreed.new_zeros(len(labels)).index_add(0, owner, values) for values in (agreed, divergence)]
    losses = [value.double() for value in (count, routed_loss, export_loss, base_loss)]
    return torch.stack([*losses, *per_row]).cpu().numpy()


def _predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The row ``(N,)`` and the logits ``(N, C)``, float32, of every prediction that has a label."""
    if logits.dim() == 2:
        return torch.arange(len(logits), device=logits.device), logits.float()
    labelled = labels[:, 1:] != IGNORED
    return labelled.nonzero()[:, 0], logits[:, :-1][labelled].float()
