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
from guilomo.layers.routers import router_class
from guilomo.search.checkpoint import load_state, optimizer_tensors, restore_optimizer, save_state
from guilomo.search.config import SearchConfig
from guilomo.search.data import Batch, RowOrder, SearchData, check_rows, mean_loss, row_losses, rows_at, to_device
from guilomo.search.estimate import estimate
from guilomo.search.hypergradient import HYPERGRADIENTS, Problem, outer
from guilomo.search.inner import learning_rate_at, make_optimizer
from guilomo.search.result import SearchResult
from guilomo.search.split_pass import masked, split_batch
from guilomo.search.trajectory import Trajectory
from guilomo.search.vectors import SelectionVectors
from guilomo.tuner import LoraMoeConfig, LoraMoeLayer, context_of

Progress = Callable[[int, int, str], None]
"""Called after every step with (step, steps, a short text)."""

STABLE_SHARE = 0.01
"""An allocation that moved less than this share of its rank rows between looks is taken as unchanged."""

MIXTURE_OPTIONS = (
    "lora_alpha",
    "scaling",
    "lora_dropout",
    "router",
    "router_weights",
    "balance_loss",
    "balance_coefficient",
    "balance_over",
    "balance_reduction",
    "z_loss_coefficient",
)
"""Options of the mixture that change a search; a checkpoint is continued under the same ones only."""


def search_sized(config: SearchConfig, **options: Any) -> LoraMoeConfig:
    """The over-provisioned mixture a search starts from; `options` are those of `LoraMoeConfig`."""
    sizes = {"num_experts": config.max_experts, "r": config.max_rank, "top_k": config.top_k}
    return LoraMoeConfig(**{**options, **sizes})


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

    Raises:
        GuilomoError: the budget is out of reach of the mixture, the task lacks rows, the loss is not finite, or a
            checkpoint belongs to another search.
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
    looks: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_rows(self.data)
        layers = {m.name: m for m in self.model.modules() if isinstance(m, LoraMoeLayer)}
        self.plan = self._plan()
        self.shapes = {name: module.shape for name, module in self.plan.adapted().items()}
        assert set(self.shapes) == set(layers), "the tuner wraps exactly the modules of its plan"
        self.device = next(self.model.parameters()).device
        torch.manual_seed(self.config.seed)
        self.vectors = SelectionVectors(self.shapes, self.config, self._router_parameters).to(self.device)
        self._check_budget()
        self.vectors.start_at(self.budget)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.weights, self.config)
        self.outer_optimizer = torch.optim.Adam(
            self.vectors.parameters(), lr=self.config.outer_learning_rate, betas=self.config.outer_betas
        )
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        self.problem = Problem(
            self.model,
            context_of(base),
            self.vectors,
            self.optimizer,
            self.data,
            self.config.max_grad_norm,
            self.config.outer_loss,
        )
        self.train_order = RowOrder(len(self.data.train), self.config.batch_size, self.config.seed)
        self.held_out_order = RowOrder(len(self.data.held_out), self.config.held_out_batch_size, self.config.seed + 1)
        self.foretold: dict[str, float] = {}

    def _plan(self) -> Allocation:
        """The plan of the search-sized mixture."""
        config = next(iter(getattr(self.model, "peft_config", {}).values()), None)
        plan = config.plan if isinstance(config, LoraMoeConfig) else None
        if not isinstance(config, LoraMoeConfig) or plan is None or not self._is_search_sized(plan, config.router):
            raise GuilomoError(
                f"The model does not carry a mixture of {self.config.max_experts} experts of rank "
                f"{self.config.max_rank} with top_k = {self.config.top_k} everywhere. Attach one with "
                "get_peft_model(model, search_sized(config, ...))."
            )
        self.router_cost = router_class(config.router).parameters_for
        self.mixture = {name: getattr(config, name) for name in MIXTURE_OPTIONS}
        return plan

    def _is_search_sized(self, plan: Allocation, router: str) -> bool:
        ranks = (self.config.max_rank,) * self.config.max_experts
        top_k = self.config.max_experts if router_class(router).dense else self.config.top_k
        return all(m.ranks == ranks and m.top_k == top_k for m in plan.adapted().values())

    def _check_budget(self) -> None:
        least, most = self._least_parameters(), self.plan.parameters(self._router_parameters)
        if not least <= self.budget <= most:
            raise GuilomoError(
                f"budget = {self.budget} is not usable: expected {least} to {most} trainable parameters, from the "
                f"fewest experts at rank 1 to what max_experts = {self.config.max_experts} and max_rank = "
                f"{self.config.max_rank} can spend. Change the budget, raise those two, or adapt fewer modules."
            )

    def _least_parameters(self) -> int:
        """What the smallest plan costs that the search may end with."""
        experts = self.config.top_k if self._top_k_floor else 1
        costs = [experts * sum(s) + self._router_parameters(experts, s.in_features) for s in self.shapes.values()]
        return min(costs) if self.config.min_experts == 0 else sum(costs)

    @property
    def _top_k_floor(self) -> bool:
        return self.config.min_experts is None or self.config.min_experts >= self.config.top_k

    def _router_parameters(self, experts: int, in_features: int) -> int:
        return self.router_cost(experts, in_features) if experts > 1 else 0

    def run(self, progress: Progress | None = None, should_stop: Callable[[], bool] = lambda: False) -> SearchResult:
        """Runs from the present step to the end, until the allocation is stable, or until asked to stop.

        Args:
            progress: see `Progress`.
            should_stop: asked after every step; when true the state is saved and the result so far returned.
        """
        self.resume()
        self.model.train()
        if not self.foretold:
            self.foretold = estimate(self.problem, self._batch(self.data.train, self.train_order(0)), self.config)
        stable, asked = self._stable(), False
        while self.step < self.config.steps and not stable and not asked:
            started = time.perf_counter()
            text = self._one_step()
            self.step += 1
            self.seconds += time.perf_counter() - started
            stable, asked = self._look(), should_stop()
            if self.step % self.config.checkpoint_every == 0 or stable or asked or self.step == self.config.steps:
                self.save()
            if progress is not None:
                progress(self.step, self.config.steps, text)
        return self._result(stable and self.step < self.config.steps)

    def _outer_steps_before(self, step: int) -> int:
        """Number of outer steps among the first `step` steps."""
        return max(0, -(-(step - self.config.warmup_steps) // self.config.outer_every))

    def _is_outer(self) -> bool:
        since = self.step - self.config.warmup_steps
        return since >= 0 and since % self.config.outer_every == 0

    def _one_step(self) -> str:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.config)
        self.vectors.temperature = self._temperature(self.step)
        train_rows = rows_at(self.data.train, self.train_order(self.step))
        if not self._is_outer():
            train, held_out = self._inner_step(self._collate(train_rows)), None
        else:
            index = self._outer_steps_before(self.step)
            held_rows = rows_at(self.data.held_out, self.held_out_order(index))
            if self.config.hypergradient == "first_order":
                train, held_out = self._split_step(train_rows, held_rows)
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

    def _temperature(self, step: int) -> float:
        share = step / max(self.config.steps - 1, 1)
        start, end = self.config.temperature, self.config.final_temperature
        return float(start * (end / start) ** share)

    def _inner_step(self, batch: Batch) -> float:
        """One weight step with the masks held constant."""
        with masked(self.problem.context, self.vectors.masks(detach=True)):
            loss = mean_loss(*row_losses(self.model, batch, self.data))
            loss.backward()
        value = self._finite(loss, "training")
        self._update_weights()
        return value

    def _split_step(self, train_rows: list[Any], held_rows: list[Any]) -> tuple[float, float]:
        """A weight step and a selection step from one forward and backward over both kinds of rows."""
        n = len(train_rows)
        batch = self._collate([*train_rows, *held_rows])
        with split_batch(self.model, self.problem.context, n), masked(self.problem.context, self.vectors.masks()):
            sums, counts = row_losses(self.model, batch, self.data)
            train, held_out = mean_loss(sums[:n], counts[:n]), mean_loss(sums[n:], counts[n:])
            (train + outer(held_out, self.config.outer_loss)).backward()
        values = self._finite(train, "training"), self._finite(held_out, "held-out")
        self._outer_update()
        self._update_weights()
        return values

    def _outer_update(self) -> None:
        """Adds the budget's pull to the hypergradient and moves the selection vectors."""
        if self.config.budget_weight and self.config.relaxation == "survival":
            (self.config.budget_weight * self.vectors.budget_penalty(self.budget)).backward()
        self.outer_optimizer.step()
        self.outer_optimizer.zero_grad(set_to_none=True)

    def _update_weights(self) -> None:
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _value(self, batch: Batch) -> float:
        rng = torch.get_rng_state()
        with masked(self.problem.context, self.vectors.masks(detach=True)):
            loss = mean_loss(*row_losses(self.model, batch, self.data))
        torch.set_rng_state(rng)
        return self._finite(loss, "held-out")

    def _finite(self, loss: Tensor, kind: str) -> float:
        value = float(loss.detach())
        if value != value or value in (float("inf"), float("-inf")):
            raise GuilomoError(
                f"The {kind} loss became {value} at step {self.step} of the search. Lower search.learning_rate "
                f"(now {self.config.learning_rate}) or set search.max_grad_norm."
            )
        return value

    def _collate(self, rows: list[Any]) -> Batch:
        return to_device(self.data.collate(rows), self.device)

    def _batch(self, rows: Any, indices: list[int]) -> Batch:
        return self._collate(rows_at(rows, indices))

    def allocation(self) -> Allocation:
        """The present preference, projected onto the budget."""
        return learned(
            self.vectors.preference(self.budget),
            self.shapes,
            self.budget,
            max_experts=self.config.max_experts,
            max_rank=self.config.max_rank,
            top_k=self.config.top_k,
            top_k_floor=self._top_k_floor,
            alpha=self.plan.alpha,
            scaling=self.plan.scaling,
            router=self._router_parameters,
            strategy=f"guilomo ({self.config.relaxation}, {self.config.hypergradient})",
        )

    def _look(self) -> bool:
        """Notes the allocation every `check_every` outer steps; true when it has been stable for `patience` looks."""
        done = self._outer_steps_before(self.step)
        fresh = done > self._outer_steps_before(self.step - 1) and done % self.config.check_every == 0
        if self.config.patience and fresh:
            self.looks = [*self.looks, [list(m.ranks) for m in self.allocation().modules.values()]]
            self.looks = self.looks[-(self.config.patience + 1) :]
            return self._stable()
        return False

    def _stable(self) -> bool:
        if not self.config.patience or len(self.looks) <= self.config.patience:
            return False
        return all(_moved(a, b) <= STABLE_SHARE for a, b in zip(self.looks, self.looks[1:], strict=False))

    def _result(self, stopped: bool) -> SearchResult:
        return SearchResult(
            allocation=self.allocation(),
            preference=self.vectors.preference(self.budget),
            budget=self.budget,
            config=self.config,
            trajectory=self.trajectory,
            steps=self.step,
            outer_steps=self._outer_steps_before(self.step),
            seconds=self.seconds,
            stopped_early=stopped,
            estimate=self.foretold,
        )

    @property
    def _checkpoint(self) -> Path | None:
        return None if self.folder is None else Path(self.folder) / "search.safetensors"

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be continued."""
        rows = {"train_rows": len(self.data.train), "held_out_rows": len(self.data.held_out)}
        size = sum(w.numel() for w in self.weights)
        mixture = {**self.mixture, "trained_parameters": size, "modules": self.vectors.names}
        return {**self.config.model_dump(mode="json"), "budget": self.budget, **rows, **mixture}

    def save(self) -> None:
        """Writes the whole state, atomically; without a folder it does nothing."""
        path = self._checkpoint
        if path is None:
            return
        tensors: dict[str, Tensor] = {f"weight.{i}": w for i, w in enumerate(self.weights)}
        tensors |= {f"selection.{i}": g for i, g in enumerate(self.problem.selection)}
        tensors |= {f"trajectory.{k}": v for k, v in self.trajectory.tensors().items()}
        tensors |= optimizer_tensors(self.optimizer, "inner") | optimizer_tensors(self.outer_optimizer, "outer")
        tensors["rng"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        facts = {
            "identity": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "trajectory": self.trajectory.numbers(),
            "looks": self.looks,
            "estimate": self.foretold,
        }
        save_state(path, tensors, facts)

    def resume(self) -> None:
        """Continues from the folder's checkpoint, if there is one.

        Raises:
            GuilomoError: the checkpoint is damaged or of another search.
        """
        path = self._checkpoint
        if path is None or not path.exists():
            return
        tensors, facts = load_state(path)
        _refuse_other_search(path, facts["identity"], self._identity())
        with torch.no_grad():
            for i, w in enumerate(self.weights):
                w.copy_(tensors[f"weight.{i}"])
            for i, g in enumerate(self.problem.selection):
                g.copy_(tensors[f"selection.{i}"])
        restore_optimizer(self.optimizer, tensors, "inner")
        restore_optimizer(self.outer_optimizer, tensors, "outer")
        recorded = {k.removeprefix("trajectory."): v for k, v in tensors.items() if k.startswith("trajectory.")}
        self.trajectory = Trajectory.restored(facts["trajectory"], recorded)
        self.step, self.seconds, self.looks = facts["step"], facts["seconds"], facts["looks"]
        self.foretold = facts["estimate"]
        self.vectors.temperature = self._temperature(max(self.step - 1, 0))  # of the last step done
        torch.set_rng_state(tensors["rng"])
        if "cuda_rng" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["cuda_rng"], self.device)


def _moved(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of rank rows that differ between two looks."""
    changed = total = 0
    for x, y in zip(a, b, strict=True):
        width = max(len(x), len(y))
        x, y = x + [0] * (width - len(x)), y + [0] * (width - len(y))
        changed += sum(abs(i - j) for i, j in zip(x, y, strict=True))
        total += sum(x)
    return changed / max(total, 1)


def _refuse_other_search(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    different = [k for k in present if saved.get(k) != present[k]]
    if different:
        shown = ", ".join(f"{k}: {saved.get(k)!r} then, {present[k]!r} now" for k in different[:4])
        raise GuilomoError(
            f"{path} is of a search with other settings ({shown}). Use the same settings to continue it, or another "
            "output folder to start anew."
        )
