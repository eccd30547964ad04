"""A loss or gradient that is not finite stops the run before it reaches the weights, and is traced to a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from guilomo import LoraMoeConfig
from guilomo.errors import GuilomoError
from guilomo.layers import first_non_finite
from guilomo.run import Run
from guilomo.training import DivergedError, TrainConfig, fine_tune
from tiny_runs import run_of

MODULE = "bert.encoder.layer.1.attention.self.key"
CONFIG = TrainConfig(max_steps=6, batch_size=8)


class NanBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.nan


def poison(model: nn.Module, name: str, after: int, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the output of a module in all training passes after the first `after`."""
    passes = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal passes
        passes += torch.is_grad_enabled()
        return change(output) if passes > after else output

    model.get_submodule(f"base_model.model.{name}").register_forward_hook(hook)


@pytest.fixture
def job(colour_recipe: Any) -> Run:
    return run_of(colour_recipe(search={"patience": 0, "checkpoint_every": 1}))


def adapted(job: Run) -> Any:
    return get_peft_model(job.fresh_model(0), LoraMoeConfig(num_experts=3, r=2, top_k=2, task_type="SEQ_CLS"))


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "output": (lambda x: x * torch.inf, "loss (was|became) nan", f"first in the output of module '{MODULE}'"),
    "gradient": (
        NanBackward.apply,
        "gradient norm (was|became) nan",
        # It arises on the way back through the module, and so shows in what the module uses.
        rf"first in the backward pass, in the gradient of the output of module '({MODULE}|bert.encoder.layer.0.output)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training(fault: str, job: Run, tmp_path: Path) -> None:
    change, says, where = FAULTS[fault]
    model = adapted(job)
    poison(model, MODULE, 3, change)
    with pytest.raises(DivergedError, match=f"{says} at step 4, {where}") as error:
        fine_tune(model, job.task, CONFIG, tmp_path)
    assert "Lower train.learning_rate (now 0.001) or train.max_grad_norm (now 1.0)." in str(error.value)
    assert all(p.isfinite().all() for p in model.parameters())
    # What was saved is the step before, and continues.
    again = adapted(job)
    assert fine_tune(again, job.task, CONFIG, tmp_path).steps == 6


def test_a_fault_in_the_first_of_several_micro_batches(job: Run, tmp_path: Path) -> None:
    model = adapted(job)
    poison(model, MODULE, 4, lambda x: x * torch.inf)
    with pytest.raises(DivergedError, match=f"at step 3, first in the output of module '{MODULE}'"):
        fine_tune(model, job.task, CONFIG.model_copy(update={"accumulation": 2, "batch_size": 4}), tmp_path)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_search(fault: str, hypergradient: str, colour_recipe: Any) -> None:
    changes = {"patience": 0, "checkpoint_every": 1, "hypergradient": hypergradient}
    job = run_of(colour_recipe(search=changes))
    search = job.search_job()
    search.run(should_stop=lambda: search.step == 1)
    change, says, where = FAULTS[fault]
    poison(search.model, MODULE, 0, change)
    with pytest.raises(GuilomoError, match=f"{says} at step 1 of the search, {where}") as error:
        search.run()
    assert "Lower search.learning_rate (now 0.001) or search.max_grad_norm (now 1.0)." in str(error.value)
    assert all(w.isfinite().all() for w in search.weights)
    again = job.search_job()
    again.run()
    assert again.step == job.config.search.steps


@pytest.mark.parametrize("hypergradient", ["first_order", "unrolled"])
def test_an_outer_step(hypergradient: str, colour_recipe: Any) -> None:
    """The selection vectors are never moved by a gradient that is not finite."""
    search = run_of(colour_recipe(search={"patience": 0, "hypergradient": hypergradient})).search_job()
    search.run(should_stop=lambda: search.step == 2)
    before = [g.detach().clone() for g in search.problem.selection]
    poison(search.model, MODULE, 0, NanBackward.apply)
    with pytest.raises(
        GuilomoError, match=r"(gradient norm|hypergradient) became nan at step 2 of the search, first in"
    ):
        search.run()
    assert all(torch.equal(a, b) for a, b in zip(before, search.problem.selection, strict=True))


class Net(nn.Module):
    """Two linears; `between` is done in between, by no module."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(3, 3), nn.Linear(3, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def where(net: Net, loss: Callable[[Tensor], Tensor] = torch.sum) -> str:
    return first_non_finite(net, lambda: loss(net(torch.ones(2, 3))))


def test_every_kind_of_place() -> None:
    assert where(Net()) == "in no module when the batch was run again"
    assert where(Net(lambda x: x / 0)) == "first in the input of module 'second'"
    assert where(Net(), lambda x: x.sum() / 0) == "first in the loss, from finite outputs of every module"
    said = "first in the backward pass, in the gradient of the output of module"
    assert where(Net(), lambda x: (x * 0).abs().sqrt().sum()).startswith(said)
    assert where(Net(NanBackward.apply)) == f"{said} 'first'"
    net = Net()
    with torch.no_grad():
        net.second.bias[1] = torch.nan
    assert where(net) == "first in module 'second', in its weight 'bias' before this step"
    net.second.bias.requires_grad_(False)
    assert where(net) == "first in module 'second', in its weight 'bias' as it was loaded"


def test_nothing_stays_on_the_model() -> None:
    net = Net(lambda x: x / 0)
    where(net)
    assert all(not module._forward_hooks for module in net.modules())


def test_a_diverging_training_names_what_is_off(job: Run, tmp_path: Path) -> None:
    config = TrainConfig(max_steps=50, batch_size=8, learning_rate=1e30, max_grad_norm=0.0)
    says = r"at step \d, first in .*Lower train\.learning_rate \(now 1e\+30\) or set train\.max_grad_norm \(now off\)"
    with pytest.raises(DivergedError, match=says):
        fine_tune(adapted(job), job.task, config, tmp_path)
