"""The standard benchmarks: lm-evaluation-harness driven on a base model with one of our adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import GuilomoError, invalid


def run_lm_eval(
    base_model: str | Path,
    adapter_dir: str | Path | None,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    include_defaults: bool = True,
    model_args: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Runs lm-eval's `simple_evaluate` and returns its result dictionary (scores are under "results").

    Args:
        base_model: folder or hub name of the base model.
        adapter_dir: folder of a saved adapter, or None for the base model alone.
        tasks: names of lm-eval tasks, or of tasks defined below `include_path`.
        include_path: folder with task YAML files of your own.
        include_defaults: also index lm-eval's own tasks; False is faster where only `include_path` is wanted.
        model_args: more arguments for lm-eval's "hf" model, such as {"dtype": "bfloat16"}.
        **kwargs: passed on to `simple_evaluate` (num_fewshot, limit, batch_size, device, ...). Samples are not kept
            unless log_samples=True is given.

    Raises:
        GuilomoError: lm-eval is not installed, no tasks are given, the adapter folder holds no adapter, or lm-eval
            gives no results.
    """
    if isinstance(tasks, str) or not tasks:
        raise invalid("tasks", tasks, "a non-empty list of lm-eval task names")
    arguments: dict[str, Any] = {**(model_args or {}), "pretrained": str(base_model)}
    if adapter_dir is not None:
        if not (Path(adapter_dir) / "adapter_config.json").is_file():
            raise invalid("adapter_dir", str(adapter_dir), "a folder that holds adapter_config.json")
        arguments["peft"] = str(adapter_dir)
    harness, manager_class = _import_harness()
    manager = manager_class(
        include_path=None if include_path is None else str(include_path), include_defaults=include_defaults
    )
    options = {"log_samples": False, **kwargs}
    found = harness.simple_evaluate(
        model="hf", model_args=arguments, tasks=list(tasks), task_manager=manager, **options
    )
    if found is None:
        raise GuilomoError("lm-eval gave no results: only the main process of a distributed run has them.")
    return dict(found)


def _import_harness() -> tuple[Any, Any]:
    import guilomo  # noqa: F401  (PEFT must know the adapter type before lm-eval loads an adapter)

    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        remedy = "Install it: pip install 'guilomo[eval]'"
        raise GuilomoError(f"run_lm_eval needs the package lm-eval ({error}). {remedy}") from error
    return lm_eval, TaskManager
