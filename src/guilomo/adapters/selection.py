"""Chooses the adapters of a bank that suit a task, from a few labelled examples."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from guilomo.adapters.attached import attached
from guilomo.adapters.digest import digest_of
from guilomo.adapters.fit import module_shapes, refuse_other_base
from guilomo.adapters.lora import LoraAdapter, read_adapter
from guilomo.adapters.rocket import check_sizes, rocket_choice
from guilomo.adapters.shots import ShotScore, draw_shots, score_shots
from guilomo.adapters.similarity import similarity
from guilomo.errors import GuilomoError, invalid, unknown
from guilomo.tasks import Task

WAYS = ("rocket", "accuracy", "perplexity", "manual", "random")
Progress = Callable[[int, int, str], None]
"""Called with (adapters scored, adapters in all, the name of the last)."""


@dataclass(frozen=True)
class Candidate:
    """One adapter of the bank.

    Attributes:
        name, folder: of the adapter.
        digest: see `digest_of`; None where it was neither scored nor chosen.
        accuracy, perplexity: on the K examples, see `ShotScore`; None where they were not asked for.
        rank_sum: see `rocket_choice`; None for the other ways.
    """

    name: str
    folder: str
    digest: str | None = None
    accuracy: float | None = None
    perplexity: float | None = None
    rank_sum: int | None = None


@dataclass(frozen=True)
class Selection:
    """Which adapters were chosen, and why.

    Attributes:
        by: one of WAYS. chosen: names, best first (rocket: by the candidates' ranks; manual: as given).
        candidates: every adapter of the bank, by name.
        task, data_hash: the task's; the hash is over all its splits.
        k: how many examples were asked for. examples: the ids of those that scored; empty where nothing was scored.
        seed: of the examples, or of the random choice.
        pool: rocket: the candidates whose combinations were looked at.
        similarities: rocket: of every pair in the pool, as (one, other, value).
    """

    by: str
    chosen: list[str]
    candidates: list[Candidate]
    task: str
    data_hash: str
    k: int
    examples: list[str]
    seed: int
    pool: list[str] = field(default_factory=list)
    similarities: list[tuple[str, str, float]] = field(default_factory=list)

    @property
    def folders(self) -> dict[str, Path]:
        """The chosen adapters, as `mixture_of` takes them."""
        known = {candidate.name: Path(candidate.folder) for candidate in self.candidates}
        return {name: known[name] for name in self.chosen}

    def in_bank(self, bank: Mapping[str, Path], remedy: str) -> dict[str, Path]:
        """The chosen adapters where a bank has them now, or else where they were; as they were when chosen.

        Those that were not chosen are not looked at: their scores have done their part.

        Args:
            bank: adapter folders by name. remedy: what to do where an adapter cannot be restored.

        Raises:
            GuilomoError: one has other weights or another configuration than when it was chosen, or none.
        """
        digests = {candidate.name: candidate.digest for candidate in self.candidates}
        folders = {name: bank.get(name, folder) for name, folder in self.folders.items()}
        for name, folder in folders.items():
            if digest_of(folder) != digests[name]:
                raise GuilomoError(
                    f"Adapter {name!r} in {folder} is not the one that was chosen: its weights or its configuration "
                    f"were replaced since, or are gone. Restore it, or {remedy}."
                )
        return folders

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what is not finite is "inf"."""
        found = asdict(self)
        for candidate in found["candidates"]:
            if candidate["perplexity"] is not None and not math.isfinite(candidate["perplexity"]):
                candidate["perplexity"] = str(candidate["perplexity"])
        return {**found, "similarities": [list(pair) for pair in self.similarities]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Selection:
        """Back from `to_dict`.

        Raises:
            GuilomoError: it is something else, or lacks the digest of a chosen adapter.
        """
        try:
            candidates = [Candidate(**c) for c in content["candidates"]]
            candidates = [c if c.perplexity is None else replace(c, perplexity=float(c.perplexity)) for c in candidates]
            pairs = [(str(one), str(other), float(value)) for one, other, value in content["similarities"]]
            selection = cls(**{**content, "candidates": candidates, "similarities": pairs})
            digests = {candidate.name: candidate.digest for candidate in candidates}
            if not all(digests[name] for name in selection.chosen):
                raise ValueError("a chosen adapter has no digest")
        except (KeyError, TypeError, ValueError) as error:
            raise GuilomoError(
                f"This is no selection of adapters ({error!r}). Make it with guilomo bank select."
            ) from error
        return selection

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Reads a file that holds what `to_dict` gave as JSON.

        Raises:
            GuilomoError: there is none, or it holds something else.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise GuilomoError(f"{path} cannot be read as a selection ({error}).") from error


def select(
    model: nn.Module,
    bank: Mapping[str, str | Path],
    task: Task,
    k: int = 50,
    *,
    by: str = "rocket",
    count: int = 4,
    names: Sequence[str] | None = None,
    pool: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Selection:
    """Chooses `count` adapters of a bank for a task, from K of its training rows.

    The ways, all of which LoRALib (arXiv 2509.18137) compares or Rocket (arXiv 2408.15915) uses:
        rocket: accuracy, perplexity and unlikeness together, see `rocket_choice`.
        accuracy: the most examples right; ties go to the lower perplexity, then by name.
        perplexity: the likeliest answers, per token; ties by name.
        manual: `names`, after a check that they fit the model.
        random: drawn with `seed`; a control.

    One adapter at a time is attached to `model` itself, which is afterwards as before: beside the model there is never
    more than one adapter on its device. The order of the bank does not matter.

    Args:
        model: the base model.
        bank: adapter folders by name, see `adapters_in`.
        task: whose training rows are drawn from. k: how many (50 in Rocket).
        by: one of WAYS. count: how many adapters (4 in Rocket). names: with "manual".
        pool: with "rocket": among how many of the best combinations are looked for (8 in Rocket).
        seed: see above. batch_size: changes rounding only. progress: see `Progress`.

    Raises:
        GuilomoError: no such way; a count, k, pool or name that the bank or task does not have; an adapter that cannot
            become an expert of this model; a task without right answers where accuracy is needed.
    """
    _check(bank, by, count, names)
    if by == "rocket":
        check_sizes(len(bank), count, pool)
    shapes = module_shapes(model)
    folders = {name: Path(bank[name]) for name in sorted(bank)}
    wanted = list(names) if names is not None else _drawn(folders, count, seed) if by == "random" else []
    for name in wanted or folders:
        refuse_other_base(read_adapter(folders[name], name), shapes)
    digests = {name: digest_of(folders[name]) for name in wanted or folders}
    facts: dict[str, Any] = {"by": by, "task": task.name, "data_hash": task.data_hash, "k": k, "seed": seed}
    if wanted:
        candidates = [Candidate(name, str(folder), digests.get(name)) for name, folder in folders.items()]
        return Selection(chosen=wanted, candidates=candidates, examples=[], **facts)
    shots = draw_shots(task, k, seed)
    scores = _scores(model, folders, shots, by != "perplexity", batch_size, progress)
    facts["examples"] = [str(row["example"]) for row in shots.train]
    perplexity = {name: score.perplexity for name, score in scores.items()}
    accuracy = {name: score.accuracy or 0.0 for name, score in scores.items()}
    candidates = [
        Candidate(name, str(folders[name]), digests[name], score.accuracy, score.perplexity)
        for name, score in scores.items()
    ]
    if by == "rocket":
        choice = rocket_choice(accuracy, perplexity, partial(_similarity, folders, {}), count, pool)
        candidates = [replace(c, rank_sum=choice.rank_sums[c.name]) for c in candidates]
        return Selection(
            chosen=choice.chosen, candidates=candidates, pool=choice.pool, similarities=choice.similarities, **facts
        )
    worst_last = {n: math.inf if math.isnan(value) else value for n, value in perplexity.items()}
    order = sorted(folders, key=lambda n: (-accuracy[n] if by == "accuracy" else 0, worst_last[n], n))
    return Selection(chosen=order[:count], candidates=candidates, **facts)


def _check(bank: Mapping[str, str | Path], by: str, count: int, names: Sequence[str] | None) -> None:
    if by not in WAYS:
        raise unknown("by", by, WAYS)
    if not bank:
        raise invalid("bank", dict(bank), "at least one adapter folder by name")
    if (by == "manual") != (names is not None):
        raise invalid("names", names, "the adapters to take with by='manual', and unset otherwise")
    for name in names or ():
        if name not in bank:
            raise unknown("names", name, bank)
    if names is not None and (len(set(names)) < len(names) or not names):
        raise invalid("names", list(names), "different names of adapters in the bank")
    if names is None and not (isinstance(count, int) and 1 <= count <= len(bank)):
        raise invalid("count", count, f"a whole number from 1 to {len(bank)}, the adapters in the bank")


def _drawn(folders: Mapping[str, Path], count: int, seed: int) -> list[str]:
    return random.Random(seed).sample(sorted(folders), count)


def _scores(
    model: nn.Module,
    folders: Mapping[str, Path],
    shots: Task,
    accuracy: bool,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, ShotScore]:
    scores = {}
    for done, (name, folder) in enumerate(folders.items(), start=1):
        with attached(model, folder) as adapted:
            scores[name] = score_shots(adapted, shots, accuracy, batch_size)
        if progress is not None:
            progress(done, len(folders), name)
    return scores


def _similarity(folders: Mapping[str, Path], read: dict[str, LoraAdapter], one: str, other: str) -> float:
    """Of two adapters of the bank; each is read once."""
    for name in (one, other):
        if name not in read:
            read[name] = read_adapter(folders[name], name)
    return similarity(read[one], read[other])
