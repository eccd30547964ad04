"""Adapters saved by every release so far load with the outputs they had, and are saved again as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import guilomo
from golden.make_golden import base_model

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))


def test_this_release_has_one() -> None:
    assert guilomo.__version__ in RELEASES


@pytest.mark.parametrize("release", RELEASES)
def test_golden_adapter(release: str, tmp_path: Path) -> None:
    """Outputs to 1e-6: another processor may add in another order. What is saved again is the same to the bit."""
    golden = load_file(GOLDEN / release / "golden.safetensors")
    base = base_model()
    base.load_state_dict({n.removeprefix("base."): t for n, t in golden.items() if n.startswith("base.")})
    with torch.no_grad():
        plain = base(input_ids=golden["input_ids"]).logits
        model = PeftModel.from_pretrained(base, str(GOLDEN / release)).eval()
        logits = model(input_ids=golden["input_ids"]).logits
    assert torch.allclose(logits, golden["logits"], rtol=0, atol=1e-6)
    assert (plain - golden["logits"]).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (GOLDEN / release, tmp_path))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())
