"""What the processes of `test_in_parallel` run; a module of its own, so that fresh processes import no tests."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adapter_tools import attach, gradients, logits
from tiny_models import build, inputs_for

PROCESSES = 2
LEARNING_RATE = 0.5


def mixture() -> PeftModel:
    """The same weights in every process; few tokens choose among many experts, so that some experts get none."""
    torch.manual_seed(0)
    options = {"num_experts": 6, "rank_pattern": {"up_proj": [1, 3, 2]}, "balance_coefficient": 0.5}
    return attach(build("llama"), z_loss_coefficient=0.1, **options).train()


def rows_of(rank: int) -> dict[str, Tensor]:
    """One row: the rows of two processes differ, and so do the numbers of their label tokens."""
    return {k: v[rank : rank + 1] for k, v in inputs_for("llama").items()}


def _join(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=PROCESSES)


def data_parallel(rank: int, folder: Path) -> None:
    """Gradients of two steps in a row: an unused parameter in the first would end the second."""
    _join(rank, folder)
    model = mixture()
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    found = []
    for _ in range(2):
        wrapped(**rows_of(rank)).loss.backward()
        found.append(gradients(model))
        model.zero_grad()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def fully_sharded(rank: int, folder: Path) -> None:
    """Gradients of a step, the outputs after it, and the adapter saved from the shards."""
    _join(rank, folder)
    model = mixture()
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    model(**rows_of(rank)).loss.backward()
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if isinstance(p.grad, DTensor)}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE).step()
    outputs = logits(model, rows_of(0))
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=whole)
    torch.save({"gradients": found, "outputs": outputs}, folder / f"{rank}.pt")
    dist.destroy_process_group()
