"""lm-eval's Python API scores the adapted model: its log-likelihoods are those of the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_tools import attach, logits
from guilomo.evaluation import run_lm_eval
from tiny_models import build
from trainer_tools import text_of, word_tokenizer

pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

TASK = """
task: guilomo_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
ROWS = [{"question": text_of(i, 4), "choices": [text_of(i + 1, 1), text_of(i + 2, 2)]} for i in range(6)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = tmp_path / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(TASK.format(data=data))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "tasks"


def _by_harness(base: Path, adapter: Path | None, tasks: Path) -> list[float]:
    options: dict[str, Any] = {"include_defaults": False, "device": "cpu", "batch_size": 4, "bootstrap_iters": 0}
    found = run_lm_eval(base, adapter, ["guilomo_words"], include_path=tasks, log_samples=True, **options)
    return [float(score) for sample in found["samples"]["guilomo_words"] for score, _ in sample["filtered_resps"]]


def _by_hand(model: torch.nn.Module) -> list[float]:
    found, tokenizer = [], word_tokenizer()
    for row in ROWS:
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            tokens = tokenizer(f"{row['question']} {choice}", return_tensors="pt")["input_ids"]
            scores = logits(model, {"input_ids": tokens}).log_softmax(-1)[0, :-1]
            found.append(float(scores.gather(1, tokens[0, 1:, None])[start - 1 :].sum()))
    return found


@pytest.mark.filterwarnings("default")  # the harness and its dependencies are not ours to clean
def test_log_likelihoods(tmp_path: Path, tasks: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    model = attach(build("llama"), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    adapted = _by_harness(tmp_path / "base", tmp_path / "adapter", tasks)
    assert adapted == pytest.approx(_by_hand(model), abs=1e-5)
    base = _by_harness(tmp_path / "base", None, tasks)
    assert base == pytest.approx(_by_hand(build("llama")), abs=1e-5)
    assert max(abs(a - b) for a, b in zip(adapted, base, strict=True)) > 1e-3
