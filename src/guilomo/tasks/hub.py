"""Sources read through the `datasets` library: `hub:OWNER/DATASET[/CONFIG]` and `disk:DIR`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import GuilomoError, invalid, unknown
from .columns import Located
from .config import TaskConfig, expand_path


def load_dataset_rows(config: TaskConfig) -> tuple[list[Located], list[Located] | None, list[str] | None]:
    """Rows of the training split, of the test split (None if the source is a single set), and label names.

    Label names are those the data set declares for `label_column`, or None if it declares none.

    Raises:
        GuilomoError: `datasets` is not installed, the source cannot be read, or a split does not exist.
    """
    found = _open(config.source)
    if not isinstance(found, Mapping):
        return _rows(found, config.source), None, _declared(found, config)
    train = _pick(found, config.train_split, "train_split")
    test = _pick(found, config.test_split, "test_split")
    names = _declared(train, config)
    return (
        _rows(train, f"{config.source} {config.train_split}"),
        _rows(test, f"{config.source} {config.test_split}"),
        names,
    )


def _open(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        remedy = "Install it: pip install datasets"
        raise invalid("source", source, "the package 'datasets' to be installed", remedy) from error
    scheme, _, place = source.partition(":")
    if scheme == "disk":
        folder = expand_path(place)
        if not folder.is_dir():
            raise invalid("source", source, "an existing folder written by save_to_disk")
        return _guarded(source, lambda: datasets.load_from_disk(str(folder)))
    parts = place.split("/")
    if not all(parts) or len(parts) > 3:
        raise invalid("source", source, "hub:DATASET, hub:OWNER/DATASET or hub:OWNER/DATASET/CONFIG")
    name, settings = "/".join(parts[:2]), parts[2:]
    return _guarded(source, lambda: datasets.load_dataset(name, *settings))


def _guarded(source: str, load: Any) -> Any:
    """`datasets` raises many kinds of errors here; each is about this source, and is shown with it."""
    try:
        return load()
    except Exception as error:
        raise GuilomoError(
            f"source = {source!r} could not be read: {type(error).__name__}: {error}. Check the spelling "
            "(hub:OWNER/DATASET/CONFIG) and the network, or give a local file."
        ) from error


def _pick(found: Mapping[str, Any], split: str, field: str) -> Any:
    if split not in found:
        raise unknown(field, split, list(found))
    return found[split]


def _rows(dataset: Any, where: str) -> list[Located]:
    return [(f"{where} row {index}", row) for index, row in enumerate(dataset)]


def _declared(dataset: Any, config: TaskConfig) -> list[str] | None:
    feature = dataset.features.get(config.label_column or "label")
    names = getattr(feature, "names", None)
    return None if names is None else list(names)
