"""Generation: reading a prompt, and one token at a time behind a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.speed.cells.cell import Cell, Result, Setting
from benchmarks.speed.clocks import Work
from benchmarks.speed.kernels import count
from benchmarks.speed.models import LLAMA_LINEARS, Adaptation, Adapted, llama, random_tokens
from benchmarks.speed.variants import OURS

VARIANTS = ("frozen", "peft", *OURS, "sparse_loop", "dense_einsum", "grouped_gemm")


@dataclass(frozen=True)
class Decoder:
    """A random Llama, the tokens it holds in its cache, and the tokens of the prompt it reads."""

    hidden: int
    layers: int
    cached: int
    prompt: int
    dtype: str

    @property
    def adaptation(self) -> Adaptation:
        return Adaptation(LLAMA_LINEARS, (8,) * 8, 2, self.dtype)


def prefill_of(adapted: Adapted, tokens: Tensor) -> Work:
    @torch.no_grad()
    def run() -> Any:
        return adapted(input_ids=tokens, use_cache=True)

    return run


def decode_of(adapted: Adapted, cached: Tensor, token: Tensor) -> Work:
    """One token; the cache is cut back to its length afterwards, for the next call."""
    cache = DynamicCache()
    with torch.no_grad():
        adapted(input_ids=cached, past_key_values=cache, use_cache=True)

    @torch.no_grad()
    def run() -> None:
        adapted(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return run


def measure_decode(decoder: Decoder, setting: Setting) -> Result:
    """Eager, without gradients; kernels beyond the frozen model's, per adapted linear."""
    torch.manual_seed(setting.seed)
    base = llama(decoder.hidden, decoder.layers, decoder.dtype, heads=decoder.hidden // 64).to(setting.device)
    linears = len(decoder.adaptation.names(base))
    prompt, cached, token = (
        random_tokens(1, length, setting.seed, setting.device) for length in (decoder.prompt, decoder.cached, 1)
    )
    prefill, decode = {}, {}
    for variant in VARIANTS:
        adapted = decoder.adaptation.apply(variant, base)
        adapted.model.eval()
        prefill[variant] = prefill_of(adapted, prompt)
        decode[variant] = decode_of(adapted, cached, token)
    for work in decode.values():
        work()  # what only a first call does is not counted
    found = {variant: count(work).to_dict() for variant, work in decode.items()}
    frozen = found["frozen"]
    counts = {
        variant: {
            **counted,
            "extra_kernels_per_linear": round((counted["kernels"] - frozen["kernels"]) / linears, 2),
            "data_dependent_per_linear": round((counted["data_dependent"] - frozen["data_dependent"]) / linears, 2),
        }
        for variant, counted in found.items()
    }
    return {
        "options": {**vars(decoder), "adapted_linears": linears},
        "counts": counts,
        "times": {"decode": setting.time(decode, "frozen"), "prefill": setting.time(prefill, "frozen", setting.few)},
    }


def decode_cell(name: str, decoder: Decoder) -> Cell:
    return Cell(f"decode/{name}-{decoder.dtype}", lambda setting: measure_decode(decoder, setting))


QUICK = Decoder(hidden=256, layers=2, cached=64, prompt=64, dtype="bf16")
CELLS = [
    decode_cell("llama", Decoder(hidden=1024, layers=8, cached=64, prompt=256, dtype=dtype))
    for dtype in ("bf16", "fp32")
]
