"""What an export loses, against a loop over rows and tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

from guilomo import LoraMoeConfig
from guilomo.evaluation import evaluate
from guilomo.export import Measurement, compare, mean_gates, plain_lora, unadapted_copy
from tiny_runs import run_of


def _models(content: dict[str, Any], path: Any, **options: Any) -> tuple[Any, PeftModel, PeftModel]:
    """The task, a mixture with random experts, and its stacked export."""
    job = run_of(content)
    kind = "SEQ_CLS" if job.task.kind == "classification" else "CAUSAL_LM"
    given = {"num_experts": 3, "r": 2, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = get_peft_model(job.fresh_model(0), LoraMoeConfig(task_type=kind, lora_alpha=32, **given))
    gates = mean_gates(model, [job.task.collate(job.task.train[:8])])
    plain_lora(model, gates).save(path)
    return job.task, model, PeftModel.from_pretrained(unadapted_copy(model), str(path))


def _naive(task: Any, routed: PeftModel, export: PeftModel, row: Any) -> list[float]:
    """Predictions, agreements and divergence of one row, one prediction after the other."""
    inputs = task.collate([row])
    labels = inputs.pop("labels")
    with torch.no_grad():
        a, b = routed.eval()(**inputs).logits.double(), export.eval()(**inputs).logits.double()
    if a.dim() == 2:
        places = [(a[0], b[0])]
    else:
        places = [(a[0, t], b[0, t]) for t in range(labels.shape[1] - 1) if labels[0, t + 1] != -100]
    agreed = sum(int(x.argmax() == y.argmax()) for x, y in places)
    divergence = sum(float((x.softmax(0) * (x.log_softmax(0) - y.log_softmax(0))).sum()) for x, y in places)
    return [len(places), agreed, divergence]


@pytest.mark.parametrize("kind", ["classification", "causal_lm", "lm"])
def test_equal_to_a_loop(kind: str, colour_recipe: Any, text_recipe: Any, tmp_path: Any) -> None:
    content = colour_recipe() if kind == "classification" else text_recipe(kind)
    task, routed, export = _models(content, tmp_path / "lora")
    found = compare(routed, export, task, task.test, batch_size=3)
    naive = np.array([_naive(task, routed, export, row) for row in task.test])
    assert found.predictions.tolist() == naive[:, 0].tolist()
    assert found.agreed.tolist() == naive[:, 1].tolist()
    assert np.allclose(found.divergence, naive[:, 2], rtol=1e-3, atol=1e-5)
    assert found.divergence.min() > 0
    for model, losses in ((routed, found.routed), (export, found.export)):
        assert np.allclose(losses, evaluate(model, task, batch_size=3).row_loss, rtol=0, atol=1e-5)
    with routed.disable_adapter():
        assert np.allclose(found.base, evaluate(routed, task, batch_size=3).row_loss, rtol=0, atol=1e-5)


def test_constant_gates_lose_nothing(colour_recipe: Any, tmp_path: Any) -> None:
    task, routed, export = _models(
        colour_recipe(), tmp_path / "lora", router="fixed", router_options={"weights": [0.5, 0.2, 0.3]}
    )
    scores = compare(routed, export, task, task.test).scores()
    assert scores["agreement"].value == 1.0
    assert abs(scores["loss_added"].value) < 1e-6
    assert abs(scores["divergence"].value) < 1e-6


def _measured(base: list[float]) -> Measurement:
    rows = {"routed": [1.0, 2.0], "export": [2.0, 2.0], "agreed": [1.0, 3.0], "divergence": [0.4, 0.4]}
    return Measurement(np.array([1.0, 3.0]), base=np.array(base), **{k: np.array(v) for k, v in rows.items()})


def test_scores_are_per_prediction() -> None:
    scores = _measured([5.0, 6.0]).scores()
    assert scores["loss_added"].value == 0.25
    assert scores["divergence"].value == pytest.approx(0.2)
    assert scores["agreement"].value == 1.0
    assert scores["gain_kept"].value == 7 / 8


@pytest.mark.parametrize("base", [[1.0, 2.0], [0.5, 2.5]], ids=["no gain", "unsure gain"])
def test_no_share_of_a_gain_that_is_not_there(base: list[float]) -> None:
    assert "gain_kept" not in _measured(base).scores()


def test_a_loss_that_is_not_finite_is_said() -> None:
    measured = _measured([5.0, 6.0])
    measured.export[0] = math.inf
    scores = measured.scores()
    assert "gain_kept" not in scores
    assert scores["loss_added"].value == math.inf
