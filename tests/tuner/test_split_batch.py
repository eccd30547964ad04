"""A split batch through a whole model equals two separate passes: weights learn from one part, masks from the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_tools import attach
from guilomo.tuner import SelectionMasks, context_of
from tiny_models import build, inputs_for

pytestmark = pytest.mark.usefixtures("path")

ROWS = 3


def _masks(model: nn.Module) -> dict[str, SelectionMasks]:
    plan = model.peft_config["default"].plan
    return {
        name: SelectionMasks(
            torch.randn(m.experts, dtype=torch.float64, requires_grad=True) if m.experts > 1 else None,
            (1 + 0.1 * torch.randn(m.rank, dtype=torch.float64)).requires_grad_(),
        )
        for name, m in plan.adapted().items()
    }


def _leaves(masks: dict[str, SelectionMasks]) -> list[Tensor]:
    return [t for m in masks.values() for t in (m.log_expert, m.rank) if t is not None]


def _detached(masks: dict[str, SelectionMasks]) -> dict[str, SelectionMasks]:
    off = lambda t: None if t is None else t.detach()  # noqa: E731
    return {n: SelectionMasks(off(m.log_expert), off(m.rank)) for n, m in masks.items()}


def _row_losses(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """``(B,)`` one loss per row, so that the loss of a part is its sum."""
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    losses = F.cross_entropy(outputs[:, :-1].transpose(1, 2), inputs["labels"][:, 1:], reduction="none")
    return losses.sum(1)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("router", ["topk", "dense"])
@pytest.mark.parametrize("balance_over", ["module", "layer"])
def test_equals_two_passes(balance_over: str, router: str, n: int) -> None:
    ranks = {"v_proj": [1, 3, 2], "o_proj": [2, 2, 4]}
    if balance_over == "module":
        ranks |= {"up_proj": [3]}
    options = {"rank_pattern": ranks, "router": router, "balance_coefficient": 0.5, "z_loss_coefficient": 0.1}
    model = attach(build("llama").double(), balance_over=balance_over, **options).double().train()
    context = context_of(model.get_base_model())
    inputs = inputs_for("llama", rows=ROWS)
    train, held_out = ({k: v[part] for k, v in inputs.items()} for part in (slice(0, n), slice(n, ROWS)))
    weights = {k: p for k, p in model.named_parameters() if p.requires_grad}
    masks = _masks(model)

    context.masks = masks
    context.training_rows = n
    together = _row_losses(model, inputs)
    found = torch.autograd.grad(together.sum(), [*weights.values(), *_leaves(masks)])
    context.training_rows = None

    context.masks = _detached(masks)
    on_training = _row_losses(model, train)
    wanted = torch.autograd.grad(on_training.sum(), list(weights.values()))
    context.masks = masks
    model.eval()  # router losses belong to the training rows alone
    on_held_out = _row_losses(model, held_out)
    wanted += torch.autograd.grad(on_held_out.sum(), _leaves(masks))

    assert torch.allclose(together, torch.cat([on_training, on_held_out]), rtol=1e-12)
    names = [*weights, *(f"mask {i}" for i in range(len(_leaves(masks))))]
    for name, ours, reference in zip(names, found, wanted, strict=True):
        assert (ours - reference).abs().max() <= 1e-12 * reference.abs().max().clamp_min(1), name
    assert max(float(g.abs().max()) for g in wanted[len(weights) :]) > 1e-6
    assert all(g.abs().max() > 0 for g in wanted[: len(weights)])


def test_the_other_part_feeds_nothing() -> None:
    """With all rows held out no weight moves; with all rows for training no mask does."""
    model = attach(build("llama").double(), balance_coefficient=0.5).double().train()
    context = context_of(model.get_base_model())
    inputs = inputs_for("llama", rows=ROWS)
    weights = [p for p in model.parameters() if p.requires_grad]
    masks = _masks(model)
    context.masks = masks
    for n, moved in ((0, False), (ROWS, True)):
        context.training_rows = n
        grads = torch.autograd.grad(_row_losses(model, inputs).sum(), [*weights, *_leaves(masks)])
        assert any(bool(g.any()) for g in grads[: len(weights)]) == moved
        assert any(bool(g.any()) for g in grads[len(weights) :]) == (not moved)


def test_a_layer_without_the_batch_in_front_is_refused() -> None:
    model = attach(build("llama"))
    context = context_of(model.get_base_model())
    context.training_rows, context.batch_size = 1, 3
    with pytest.raises(RuntimeError, match=r"split batch of 3 rows met a layer input of shape \(7, 4\)"):
        context.split_at(torch.zeros(7, 4))


def test_ordinary_batches_feed_masks_from_every_row() -> None:
    model = attach(build("llama").double()).double().eval()  # no router losses: they are not linear in the batch
    context = context_of(model.get_base_model())
    masks = _masks(model)
    context.masks = masks
    inputs = inputs_for("llama", rows=ROWS)
    whole = torch.autograd.grad(_row_losses(model, inputs).sum(), _leaves(masks))
    parts = torch.autograd.grad(_row_losses(model, {k: v[:1] for k, v in inputs.items()}).sum(), _leaves(masks))
    rest = torch.autograd.grad(_row_losses(model, {k: v[1:] for k, v in inputs.items()}).sum(), _leaves(masks))
    for w, a, b in zip(whole, parts, rest, strict=True):
        assert torch.allclose(w, a + b, rtol=1e-9, atol=1e-12)
