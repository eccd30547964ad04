"""What the processes of `test_biases` run; a module of its own, so that fresh processes import no tests."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from adapter_tools import attach
from guilomo.tuner import update_router_biases
from router_cases import options_of
from tiny_models import build, inputs_for

PROCESSES = 2
STEPS = 3


def mixture() -> PeftModel:
    torch.manual_seed(0)
    return attach(build("llama"), **options_of("loss_free", balance_loss=None)).train()


def rows_of(rank: int) -> dict[str, Tensor]:
    return {k: v[2 * rank : 2 * rank + 2] for k, v in inputs_for("llama", rows=4).items()}


def biases(model: PeftModel) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if n.endswith("bias") and "molora_router" in n}


def data_parallel(rank: int, folder: Path) -> None:
    """Biases after steps of two micro-batches, without an optimiser: routing depends on the biases alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'rendezvous'}", rank=rank, world_size=PROCESSES)
    model = mixture()
    wrapped = DistributedDataParallel(model)
    for _ in range(STEPS):
        for _ in range(2):
            wrapped(**rows_of(rank)).loss.backward()
        update_router_biases(model)
    torch.save(biases(model), folder / f"{rank}.pt")
    dist.destroy_process_group()
