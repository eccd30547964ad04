"""lm-eval without network: a local task on a tiny random model."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest

from guilomo.errors import GuilomoError
from guilomo.evaluation import run_lm_eval

TASK = """
task: guilomo_colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one lm-eval task of eight rows."""
    rows = [{"question": f"Colour {i}?", "choices": ["red", "green"], "label": i % 2} for i in range(8)]
    data = tmp_path / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "harness"
    folder.mkdir()
    (folder / "colours.yaml").write_text(TASK.format(data=data))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return folder


def _run(model: Path, folder: Path) -> dict[str, Any]:
    return run_lm_eval(
        model,
        None,
        ["guilomo_colours"],
        include_path=folder,
        include_defaults=False,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )


@pytest.mark.filterwarnings("default")  # the harness and its dependencies are not ours to clean
def test_a_local_task_runs_without_network(tmp_path: Path, colours: Path, causal: Any, bpe: Any) -> None:
    pytest.importorskip("lm_eval")
    causal.save_pretrained(tmp_path / "model")
    bpe.save_pretrained(tmp_path / "model")
    found = _run(tmp_path / "model", colours)["results"]["guilomo_colours"]
    assert 0.0 <= found["acc,none"] <= 1.0


@pytest.mark.filterwarnings("default")
def test_a_pretrained_tiny_model(colours: Path) -> None:
    pytest.importorskip("lm_eval")
    if not os.environ.get("GUILOMO_DATA"):
        pytest.skip("GUILOMO_DATA is not set: the shared models are not here")
    found = _run(Path(os.environ["GUILOMO_DATA"]) / "models" / "stories260K", colours)
    assert "acc,none" in found["results"]["guilomo_colours"]


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(GuilomoError, match="non-empty list"):
        run_lm_eval("model", None, [])
    with pytest.raises(GuilomoError, match="non-empty list"):
        run_lm_eval("model", None, "piqa")
    with pytest.raises(GuilomoError, match=r"adapter_config\.json"):
        run_lm_eval("model", tmp_path, ["piqa"])


def test_a_missing_harness_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(GuilomoError, match=r"pip install 'guilomo\[eval\]'"):
        run_lm_eval("model", None, ["piqa"])
