"""The tiny models and data of `tiny_runs`, and one comparison that is done; read only."""

from __future__ import annotations

from pathlib import Path

import pytest

from comparisons import Finished, comparison, finish
from tiny_runs import bert_folder, colours, llama_folder

__all__ = ["bert_folder", "colours", "finished", "llama_folder"]


@pytest.fixture(scope="session")
def finished(bert_folder: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two tasks, three methods, two seeds, a sweep, and costs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guilomo.compare.costs.SECONDS", 0.0)
        return finish(comparison(bert_folder, colours, tmp_path_factory.mktemp("compare") / "out"))
