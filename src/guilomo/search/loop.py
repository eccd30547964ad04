"""The bilevel search: weight steps on training rows, selection steps on held-out rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guilomo.allocation import Allocation
from guilomo.allocation.learned import learned
from guilomo.errors import GuilomoError
from guilomo.search import distributed
from guilomo.search.config import SearchConfig
from guilomo.search.data import Batch, RowOrder, SearchData, check_rows, mean_loss, row_losses, rows_at, to_device
from guilomo.search.draws import HOLDING_OUT, TRAINING, Rows, Shown, show
from guilomo.search.estimate import estimate
from guilomo.search.finite import finite_values, gradient_norm
from guilomo.search.hypergradient import HYPERGRADIENTS, Problem, outer, unrolled_pass
from guilomo.search.inner import make_optimizer
from guilomo.search.mixture import SearchMixture
from guilomo.search.moved import Moved, start_of
from guilomo.search.result import SearchResult
from guilomo.search.schedule import is_outer, learning_rate_at, outer_steps_before, temperature_at
from guilomo.search.split_pass import leaves_of, masked, split_batch
from guilomo.search.stability import Stability
from guilomo.search.state import resume_search, save_search
from guilomo.search.trajectory import Trajectory
from guilomo.search.vectors import SelectionVectors
from guilomo.tuner import context_of, plan_for_router

Progress = Callable[[int, int, str], None]
"""Called with (step, steps, a short text) before the first step, with the estimate, and after every step."""


def search(
    model: nn.Module,
    data: SearchData,
    config: SearchConfig,
    budget: int,
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Searches the allocation of a model for a task under a parameter budget (GuiLoMo, arXiv 2506.14646).

    Args:
        model: a PeftModel carrying the mixture of `search_sized`; its weights are trained on the way.
        data: training and held-out rows, see `SearchData`.
        budget: trainable parameters the final mixture may use, routers included.
        folder: where checkpoints go; a checkpoint found there is continued, to the same bits.
        progress: see `Progress`.

    In a process group (``torchrun``, see `guilomo.search.process_group`) all processes call this alike and get the same
    result; batch sizes count the rows of all of them.

    Raises:
        GuilomoError: the budget is out of reach of the mixture, the task lacks rows, the loss is not finite, a
            checkpoint belongs to another search, or several processes cannot do what the config asks.
    """
    return Search(model, data, config, budget, folder).run(progress)


@dataclass
class Search:
    """A search that can be stepped, saved and continued."""

    model: nn.Module
    data: SearchData
    config: SearchConfig
    budget: int
    folder: str | Path | None = None
    step: int = 0
    seconds: float = 0.0
    trajectory: Trajectory = field(default_factory=Trajectory)

    def __post_init__(self) -> None:
        check_rows(self.data)
        self.mixture = SearchMixture.of(self.model, self.config)
        self.mixture.check_budget(self.budget)
        self.device = next(self.model.parameters()).device
        distributed.check_processes(self.config, self.device)
        torch.manual_seed(self.config.seed)
        router = self.mixture.router_parameters
        self.vectors = SelectionVectors(self.mixture.shapes, self.config, router).to(self.device)
        self.vectors.start_at(self.budget)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        distributed.start_alike(self.weights)
        self.optimizer = make_optimizer(self.weights, self.config)
        self.outer_optimizer = torch.optim.Adam(
            self.vectors.parameters(), lr=self.config.outer_learning_rate, betas=self.config.outer_betas
        )
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        clip, kind = self.config.max_grad_norm, self.config.outer_loss
        self.problem = Problem(self.model, context_of(base), self.vectors, self.optimizer, self.data, clip, kind)
        self.train_order = RowOrder(len(self.data.train), self.config.batch_size, self.config.seed)
        self.held_out_order = RowOrder(len(self.data.held_out), self.config.held_out_batch_size, self.config.seed + 1)
        self.foretold: dict[str, float] = {}
        self.stability = Stability(self.config.patience)

    def run(self, progress: Progress | None = None, should_stop: Callable[[], bool] = lambda: False) -> SearchResult:
        """Runs from the present step to the end, until the allocation is stable, or until asked to stop.

        Args:
            progress: see `Progress`.
            should_stop: asked after every step; when true the state is saved and the result so far returned.
        """
        self.resume()
        self.model.train()
        if not self.foretold:
            found = estimate(self.problem, self._batch(self.data.train, self.train_order(0)), self.config)
            told = distributed.same_everywhere(*found.values(), device=self.device)
            self.foretold = dict(zip(found, told, strict=True))
        if progress is not None and self.step < self.config.steps:
            expected = "about {seconds:.0f} s and {memory_gib:.2f} GiB in all".format(**self.foretold)
            progress(self.step, self.config.steps, expected)
        asked = False
        while self.step < self.config.steps and not self.stability.reached and not asked:
            started = time.perf_counter()
            text = self._one_step()
            self.step += 1
            self.seconds += time.perf_counter() - started
            self._look()
            decided = distributed.same_everywhere(should_stop(), self.seconds, device=self.device)
            asked, self.seconds = bool(decided[0]), decided[1]
            last = asked or self.stability.reached or self.step == self.config.steps
            if last or self.step % self.config.checkpoint_every == 0:
                self.save()
            if progress is not None:
                progress(self.step, self.config.steps, text)
        return self._result()

    def _one_step(self) -> str:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.config)
        self.vectors.temperature = temperature_at(self.step, self.config)
        self.problem.step = self.step
        distributed.seed_step(self.config.seed, self.step)
        train_rows = rows_at(self.data.train, distributed.share(self.train_order(self.step)))
        if not is_outer(self.step, self.config):
            train, held_out = self._inner_step(self._collate(train_rows)), None
        else:
            held_order = self.held_out_order(outer_steps_before(self.step, self.config))
            held_rows = rows_at(self.data.held_out, distributed.share(held_order))
            if self.config.hypergradient == "first_order":
                train, held_out = self._split_step(train_rows, held_rows)
            elif self.config.hypergradient == "unrolled":
                train, held_out = self._unrolled_step(self._collate(train_rows), self._collate(held_rows))
            else:
                batches = self._collate(train_rows), self._collate(held_rows)
                gradients = HYPERGRADIENTS[self.config.hypergradient](self.problem, *batches)
                for g, gradient in zip(self.problem.selection, gradients, strict=True):
                    g.grad = gradient
                held_out = self._value(batches[1])
                self._outer_update()
                train = self._inner_step(batches[0])
        if self.step % self.config.record_every == 0 or self.step + 1 == self.config.steps:
            self.trajectory.record(self.step, train, held_out, self.vectors)
        return f"loss {train:.3f}" + ("" if held_out is None else f", held out {held_out:.3f}")

    def _inner_step(self, batch: Batch) -> float:
        """One weight step with the masks held constant; before the first outer step, sampled masks are all on."""
        warming = self.vectors.sampled and self.step < self.config.warmup_steps
        rows = [(Rows.TRAIN, len(batch["labels"]))]
        shown = Shown({}) if warming else show(self.vectors, self.step, rows, learn_from=1)
        with masked(self.problem.context, shown.masks):
            loss = mean_loss(*row_losses(self.model, batch, self.data))
            loss.backward()
        distributed.all_reduce_gradients(self.weights)
        norm = gradient_norm(self.weights)
        value, _ = finite_values(self, batch, shown.masks, {"training loss": loss, "gradient norm": norm})
        self._update_weights(norm)
        return value

    def _split_step(self, train_rows: list[Any], held_rows: list[Any]) -> tuple[float, float]:
        """A weight step and a selection step from one forward and backward over both kinds of rows."""
        n, held = len(train_rows), len(held_rows)
        groups = [(Rows.TRAIN, n), (Rows.HELD_OUT, held)]
        if self.vectors.pairs:
            held_rows = [*held_rows, *held_rows]
            groups.append((Rows.HELD_OUT_AGAIN, held))
        batch = self._collate([*train_rows, *held_rows])
        shown = show(self.vectors, self.step, groups, learn_from=1)
        context = self.problem.context
        with split_batch(self.model, context, n), leaves_of(shown.masks) as masks, masked(context, masks):
            sums, counts = row_losses(self.model, batch, self.data)
            train, held_out = mean_loss(sums[:n], counts[:n]), mean_loss(sums[n:], counts[n:])
            score = shown.score(sums[n:], counts[n:])
            (train + outer(held_out, score, self.config.outer_loss)).backward()
        distributed.all_reduce_gradients(self.weights + self.problem.selection)
        norm, outer_norm = gradient_norm(self.weights), gradient_norm(self.problem.selection)
        named = {"training loss": train, "held-out loss": held_out, "gradient norm": norm, "hypergradient": outer_norm}
        values = finite_values(self, batch, shown.masks, named)
        self._outer_update()
        self._update_weights(norm)
        return values[0], values[1]

    def _unrolled_step(self, train: Batch, held_out: Batch) -> tuple[float, float]:
        """A selection step, and the weight step that it looked ahead to."""
        found = unrolled_pass(self.problem, train, held_out)
        gradients = [*found.weights, *found.selection]
        for p, gradient in zip([*self.weights, *self.problem.selection], gradients, strict=True):
            p.grad = gradient
        norm, outer_norm = gradient_norm(self.weights), gradient_norm(self.problem.selection)
        batch, shown = self.problem.seen(train, TRAINING)
        named = {"training loss": found.train, "gradient norm": norm}
        value, _ = finite_values(self, batch, shown.masks, named)
        batch, shown = self.problem.seen(held_out, HOLDING_OUT)
        named = {"held-out loss": found.held_out, "hypergradient": outer_norm}
        held_out_value, _ = finite_values(self, batch, shown.masks, named)
        self._outer_update()
        self._update_weights(norm)
        return value, held_out_value

    def _outer_update(self) -> None:
        """Adds the budget's pull to the hypergradient and moves the selection vectors."""
        if self.config.budget_weight and self.config.relaxation == "survival":
            (self.config.budget_weight * self.vectors.budget_penalty(self.budget)).backward()
        self.outer_optimizer.step()
        self.outer_optimizer.zero_grad(set_to_none=True)

    def _update_weights(self, norm: Tensor) -> None:
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights, self.config.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _value(self, batch: Batch) -> float:
        rng = torch.get_rng_state()
        batch, shown = self.problem.seen(batch, HOLDING_OUT)
        with masked(self.problem.context, shown.masks):
            loss = mean_loss(*row_losses(self.model, batch, self.data))
        torch.set_rng_state(rng)
        named = {"held-out loss": loss, "hypergradient": gradient_norm(self.problem.selection)}
        return finite_values(self, batch, shown.masks, named)[0]

    def _collate(self, rows: list[Any]) -> Batch:
        return to_device(self.data.collate(rows), self.device)

    def _batch(self, rows: Any, indices: list[int]) -> Batch:
        return self._collate(rows_at(rows, distributed.share(indices)))

    def allocation(self, vectors: SelectionVectors | None = None) -> Allocation:
        """The preference of the present selection vectors, or of others, projected onto the budget."""
        plan = learned(
            (self.vectors if vectors is None else vectors).preference(self.budget),
            self.mixture.shapes,
            self.budget,
            max_experts=self.config.max_experts,
            max_rank=self.config.max_rank,
            top_k=self.config.top_k,
            top_k_floor=self.config.top_k_floor,
            alpha=self.mixture.plan.alpha,
            scaling=self.mixture.plan.scaling,
            router=self.mixture.router_parameters,
            strategy=f"guilomo ({self.config.relaxation}, {self.config.hypergradient})",
        )
        return plan_for_router(plan, self.mixture.options.router)

    def _look(self) -> None:
        """Shows the allocation to the early stop every `check_every` outer steps."""
        done = outer_steps_before(self.step, self.config)
        fresh = is_outer(self.step - 1, self.config) and done % self.config.check_every == 0
        if self.config.patience and fresh:
            self.stability.note(self.allocation())

    def _result(self) -> SearchResult:
        allocation, start = self.allocation(), start_of(self.vectors, self.budget)
        return SearchResult(
            allocation=allocation,
            preference=self.vectors.preference(self.budget),
            budget=self.budget,
            config=self.config,
            trajectory=self.trajectory,
            steps=self.step,
            outer_steps=outer_steps_before(self.step, self.config),
            seconds=self.seconds,
            stopped_early=self.stability.reached and self.step < self.config.steps,
            estimate=self.foretold,
            moved=Moved.between(start, self.vectors, self.allocation(start), allocation),
        )

    @property
    def checkpoint(self) -> Path | None:
        """The file of the search's state; None without a folder."""
        return None if self.folder is None else Path(self.folder) / "search.safetensors"

    def save(self) -> None:
        """Writes the whole state, atomically, once for all processes; without a folder it does nothing."""
        if self.checkpoint is not None and distributed.rank() == 0:
            save_search(self, self.checkpoint)
        distributed.wait_for_all()

    def resume(self) -> None:
        """Continues from the folder's checkpoint, if there is one.

        Raises:
            GuilomoError: the checkpoint is damaged, of another search, or not seen by every process.
        """
        if self.checkpoint is not None and self.checkpoint.exists():
            resume_search(self, self.checkpoint)
            self.vectors.temperature = temperature_at(max(self.step - 1, 0), self.config)  # of the last step done
        (first,) = distributed.same_everywhere(self.step, device=self.device)
        if self.step != first:
            raise GuilomoError(
                f"Process {distributed.rank()} stands at step {self.step}, process 0 at step {first:.0f}: they do not "
                f"see the same checkpoint. Put the folder {self.folder} where all of them can read it."
            )
