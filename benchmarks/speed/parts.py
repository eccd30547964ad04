"""The parts of a joined layer on a GPU, one by one: what of its time is which product.

    python -m benchmarks.speed.parts --output benchmarks/results/speed/parts/NAME.json

A layer of d 4096 with 8192 tokens, 8 experts of rank 8, top-2, bfloat16. Microseconds, medians of 25 interleaved
rounds over three sets of buffers, so that the cache is not what is measured. `wide` are the products of ``[W|B]``: they
need an x with room for the gated activations beside it, which somebody has to copy or the layer in front has to leave.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

TOKENS, WIDTH, EXPERTS, RANK, TOP_K = 8192, 4096, 8, 8, 2
SETS, ROUNDS = 3, 25

Part = Callable[[int], object]


def parts() -> dict[str, Part]:
    """Each takes the number of a set of buffers."""
    from guilomo.layers.kernels import expand_back, shrink_route
    from guilomo.layers.packed import ExpertLayout

    ranks = EXPERTS * RANK
    x, dy = _sets(TOKENS, WIDTH), _sets(TOKENS, WIDTH)
    gated, dz = _sets(TOKENS, ranks), _sets(TOKENS, ranks + EXPERTS)
    w, a, rows, b = (
        _random(*s) / s[-1] ** 0.5 for s in ((WIDTH, WIDTH), (ranks, WIDTH), (EXPERTS, WIDTH), (WIDTH, ranks))
    )
    spread = ExpertLayout((RANK,) * EXPERTS, (2.0,) * EXPERTS).cuda().spread
    stacked = torch.cat([a, rows])
    made = [shrink_route(one, a, rows, spread, TOP_K) for one in x]
    y = torch.empty(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    wide_x, wide_w = [torch.cat([one, g], 1) for one, g in zip(x, gated, strict=True)], torch.cat([w, b], 1)
    return {
        "copy x": lambda i: y.copy_(x[i]),
        "W x": lambda i: torch.mm(x[i], w.t(), out=y),
        "dy W": lambda i: torch.mm(dy[i], w, out=y),
        "W x onto y": lambda i: y.addmm_(x[i], w.t()),
        "dy W onto dx": lambda i: y.addmm_(dy[i], w),
        "kernel over x": lambda i: shrink_route(x[i], a, rows, spread, TOP_K),
        "kernel over dy": lambda i: expand_back(dy[i], b, made[i].h, made[i].weights, spread),
        "A x alone": lambda i: torch.mm(x[i], stacked.t()),
        "B gated": lambda i: torch.mm(gated[i], b.t(), out=y),
        "B gated onto y": lambda i: y.addmm_(gated[i], b.t()),
        "dz A": lambda i: torch.mm(dz[i], stacked, out=y),
        "dz A onto dx": lambda i: y.addmm_(dz[i], stacked),
        "dB": lambda i: torch.mm(dy[i].t(), gated[i]),
        "dA": lambda i: torch.mm(dz[i].t(), x[i]),
        "wide: [W|B] [x|gated]": lambda i: torch.mm(wide_x[i], wide_w.t()),
        "wide: dy [W|B]": lambda i: torch.mm(dy[i], wide_w),
    }


def measure(works: dict[str, Part]) -> dict[str, float]:
    """Microseconds of each."""
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in works}
    for work in works.values():
        for i in range(SETS):
            work(i)
    torch.cuda.synchronize()
    for turn in range(ROUNDS):
        for name, work in works.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(400_000)  # so that the calls are ahead of the device
            began.record()
            work(turn % SETS)
            ended.record()
            times[name].append((began, ended))
    torch.cuda.synchronize()
    return {name: round(1e3 * median(a.elapsed_time(b) for a, b in pairs), 1) for name, pairs in times.items()}


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _sets(*shape: int) -> list[Tensor]:
    return [_random(*shape) for _ in range(SETS)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.parts", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    output = parser.parse_args().output
    torch.manual_seed(0)
    found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "microseconds": measure(parts())}
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
