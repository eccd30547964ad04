"""transformers' own adapter interface and pipelines, without PEFT's wrapper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline

from adapter_tools import attach, logits, reload
from guilomo import LoraMoeConfig
from tiny_models import build, inputs_for
from trainer_tools import word_tokenizer

BATCH = inputs_for("llama", rows=8)
ROWS = [{k: v[i] for k, v in BATCH.items()} for i in range(8)]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter whose config names a base model that is saved beside it, with a tokenizer in both folders."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    build("llama").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    model = attach(type(build("llama")).from_pretrained(base), task_type="CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_B" in name:
                parameter.normal_(std=1.0)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_pipeline(adapter: Path) -> None:
    """A pipeline made of the adapter's folder generates what the adapted model does, and the base model does not."""
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokenizer = word_tokenizer()
    prompt = tokenizer("w5 w9 w33", return_tensors="pt")["input_ids"]

    def words(model: torch.nn.Module) -> list[str]:
        tokens = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return tokenizer.decode(tokens[0, 3:], skip_special_tokens=True).split()

    generate = pipeline("text-generation", model=str(adapter))
    found = generate("w5 w9 w33", return_full_text=False, **options)[0]["generated_text"].split()
    assert found == words(reload(build("llama"), adapter))
    assert found != words(build("llama"))


def test_trainer_with_a_native_adapter(tmp_path: Path) -> None:
    """`model.add_adapter` in place of `get_peft_model`: trains only the mixture, and its checkpoint is an adapter."""
    model = build("llama")
    model.add_adapter(LoraMoeConfig(num_experts=3, r=2, target_modules="all-linear", init_lora_weights=False))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=ROWS).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "molora" in n}
    again = build("llama")
    again.load_adapter(str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again, BATCH), logits(model, BATCH))
