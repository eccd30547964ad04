"""A quantised base model stays as it is; the mixture on it trains, is saved and comes back exactly.

Run by `make test-quantised`, which puts both packages on the path: torchao writes lines of its own to the standard
error of every process that finds it, which tests of the command line must not see.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adapter_tools import attach, logits, reload, train_a_step
from tiny_models import inputs_for, llama


def _int8() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not on the path: make test-quantised")
    return BitsAndBytesConfig(load_in_8bit=True)


def _nf4() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not on the path: make test-quantised")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not on the path: make test-quantised")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("scheme", [_int8, _nf4, _torchao], ids=["bnb int8", "bnb nf4", "torchao int8"])
def test_quantised_base(scheme: Callable[[], Any], tmp_path: Path) -> None:
    quantization = scheme()
    torch.manual_seed(1)
    llama(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "base")  # nf4 needs at least 128 features

    def base() -> nn.Module:
        options = {"quantization_config": quantization, "dtype": torch.float32}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)

    def adapted() -> PeftModel:
        model = base()
        torch.manual_seed(2)
        return attach(model, balance_coefficient=0.1)

    inputs = inputs_for("llama")
    plain = logits(base(), inputs)
    assert not torch.equal(plain, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), inputs))
    untrained = adapted()
    assert len(untrained.peft_config["default"].plan.adapted()) == 14
    with untrained.disable_adapter():
        assert torch.equal(logits(untrained, inputs), plain)
    before = logits(untrained, inputs)
    # A model of its own: on CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights for inference at the first forward
    # without gradients, and cannot train them afterwards.
    model = adapted()
    losses = [train_a_step(model, inputs) for _ in range(3)]
    assert losses[1] < losses[0]
    after = logits(model, inputs)
    assert not torch.equal(after, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), plain), "training moved the quantised weights"
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(reload(base(), tmp_path / "adapter"), inputs), after)
