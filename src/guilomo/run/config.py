"""A recipe: everything one run needs, as one validated object. YAML files and the CLI's ``--set`` fill it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from guilomo.methods import METHODS
from guilomo.search import SearchConfig
from guilomo.search.mixture import refuse_unsearchable
from guilomo.tasks import TaskConfig
from guilomo.training import TrainConfig
from guilomo.tuner import LoraMoeConfig

SEARCHED = "guilomo"
"""The strategy name of the method whose allocation the search decides."""
PLAIN_LORA = "lora"
"""The strategy name of PEFT's own LoRA at the same budget."""
RANDOM = "random"
"""The strategy name of the random control, which draws a plan of its own for every training seed."""
SHUFFLED = "shuffled"
"""The strategy name of the searched plan, its experts dealt out anew, for every seed, among modules of equal shape."""
RATES = [3e-4, 1e-3, 3e-3]
"""Learning rates that every method of a comparison is tried at unless its file says otherwise."""


class ModelConfig(BaseModel):
    """Which pretrained model."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(
        "minilm", description="minilm (packaged, extra 'demo'), a folder, or a name on the Hub. $GUILOMO_DATA expands."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the frozen weights. bfloat16: half the memory, slightly less exact."
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    matmul_precision: Literal["highest", "high", "medium"] = Field(
        "highest",
        description="Of float32 products on the CPU. medium: on some processors up to twice as fast at nearly the same "
        "error, which is measured first; where it means bfloat16, it is refused.",
    )


class MixtureConfig(BaseModel):
    """What is attached to the model; the plan says how much of it. See `LoraMoeConfig`."""

    model_config = ConfigDict(extra="forbid")

    target_modules: str | list[str] = Field("all-linear", description="Names or regex of the linears to adapt.")
    exclude_modules: str | list[str] | None = Field(None, description="Names or regex of linears to leave out.")
    modules_to_save: list[str] | None = Field(None, description="Other modules to train, beside a task head.")
    top_k: int = Field(2, ge=1, description="Experts chosen per token.")
    router: str = Field("topk", description="How experts are weighted; docs/methods.md lists the routers.")
    router_options: dict[str, Any] = Field(default_factory=dict, description="Options of the router by name.")
    router_loss_coefficient: float = Field(0.0, ge=0, description="Weight of the router's own loss, if it has one.")
    alpha: float = Field(16.0, gt=0, description="Numerator of the experts' scale.")
    scaling: Literal["alpha_over_r", "alpha_over_sqrt_r", "constant"] = Field(
        "alpha_over_r", description="Scale of an expert: alpha/r, alpha/sqrt(r) or alpha."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the experts.")
    dropout_on: Literal["input", "rank"] = Field("input", description="What is dropped; rank costs next to nothing.")
    balance_loss: str | None = Field("switch", description="Form of the balance loss; null: none.")
    balance_options: dict[str, Any] = Field(default_factory=dict, description="Options of the balance loss by name.")
    balance_coefficient: float = Field(0.001, ge=0, description="Weight of the balance loss.")
    balance_over: Literal["module", "layer"] = Field("module", description="What is balanced together.")
    balance_reduction: Literal["sum", "mean"] = Field("sum", description="Over modules or layers.")
    z_loss_coefficient: float = Field(0.0, ge=0, description="Weight of the z-loss.")
    shared_a: bool = Field(False, description="All experts of a module read one A (HydraLoRA, MoSLD).")
    drop_connect: float = Field(0.0, ge=0, lt=1, description="Dropout of the entries of a shared A (MoSLD).")
    sequential_rank: int = Field(0, ge=0, description="Rank of a branch behind the linear (Hydra); for one expert.")
    feed_forward_experts: bool = Field(False, description="Experts of whole feed-forwards (MixLoRA).")
    feed_forward_blocks: list[list[str]] | None = Field(
        None, description="Names of a feed-forward's linears in the order of running; unset: the known ones."
    )

    def peft_options(self) -> dict[str, Any]:
        """The fields of `LoraMoeConfig` that do not depend on the plan."""
        renamed = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
        return {renamed.get(name, name): getattr(self, name) for name in type(self).model_fields}

    @model_validator(mode="after")
    def _usable(self) -> MixtureConfig:
        # Whatever the model will be, so that a recipe is refused before anything is loaded.
        experts = 1 if self.sequential_rank else max(self.top_k, 2)
        LoraMoeConfig(**self.peft_options(), num_experts=experts)
        return self


class BudgetConfig(BaseModel):
    """Trainable parameters every method may use, routers included, task heads not."""

    model_config = ConfigDict(extra="forbid")

    parameters: int | None = Field(None, ge=1, description="The budget itself; unset: that of the uniform plan below.")
    experts: int = Field(4, ge=1, description="Experts per module of the uniform plan that sets the budget.")
    rank: int = Field(2, ge=1, description="Rank per expert of the uniform plan that sets the budget.")


class MethodConfig(BaseModel):
    """One row of the comparison."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the row, unique in the run.")
    strategy: str = Field(
        "",
        description="A row of `guilomo methods`: lora, guilomo, uniform, ld_mole and so on; unset: same as name.",
    )
    label: str = Field("", description="How the report calls it; unset: the method's own label.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of its allocation; for methods that have none, experts."
    )
    mixture: dict[str, Any] = Field(
        default_factory=dict, description="Keys of `mixture` in which this row differs from the method, and from all."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _defaults(self) -> MethodConfig:
        self.strategy = self.strategy or self.name
        self.label = self.label or (METHODS[self.name].label if self.name in METHODS else self.name)
        return self


class SweepConfig(BaseModel):
    """Which learning rates every method is tried at, with the first training seed."""

    model_config = ConfigDict(extra="forbid")

    learning_rates: list[float] = Field(
        default_factory=list,
        description="Every method is trained once at each, with the run's first seed, and keeps the one of the lowest "
        "held-out loss for all its seeds. Needs train.use_held_out: false. Empty: train.learning_rate for all.",
    )

    @field_validator("learning_rates")
    @classmethod
    def _a_choice(cls, rates: list[float]) -> list[float]:
        if any(not 0 < rate < math.inf for rate in rates):
            raise ValueError(f"learning_rates = {rates} is not usable: expected finite numbers above 0.")
        if rates and (len(rates) < 2 or len(set(rates)) < len(rates)):
            raise ValueError(
                f"learning_rates = {rates} is not usable: expected at least 2 different rates, or none. A single one "
                "is train.learning_rate."
            )
        return rates


METRICS = {
    "classification": ("loss", "accuracy", "f1", "matthews"),
    "causal_lm": ("loss", "perplexity", "accuracy", "accuracy_per_character", "f1", "matthews", "exact_match"),
    "lm": ("loss", "perplexity"),
}
"""What each kind of task can be scored by."""


class EvaluationConfig(BaseModel):
    """How methods are scored, on the test split."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(64, ge=1, description="Rows per batch; does not change scores.")
    generate: bool = Field(False, description="causal_lm: also generate answers greedily and match them exactly.")
    metric: (
        Literal["loss", "accuracy", "f1", "matthews", "perplexity", "accuracy_per_character", "exact_match"] | None
    ) = Field(
        None,
        description="Metric the report leads with, and tests by where it is an accuracy of any kind; unset: accuracy, "
        "exact match, perplexity or loss.",
    )


def share_top_k(value: Any) -> Any:
    """The search's own checks need the top-k of the mixture, unless the recipe gives it one."""
    if not isinstance(value, dict) or not isinstance(value.get("mixture"), dict):
        return value
    top_k, search = value["mixture"].get("top_k"), value.get("search", {})
    if isinstance(top_k, int) and top_k >= 1 and isinstance(search, dict):
        return {**value, "search": {"top_k": top_k, **search}}
    return value


class RunConfig(BaseModel):
    """A recipe."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field("run", description="Title of the run.")
    output: str = Field("", description="Folder for everything the run writes; unset: runs/<name>.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    mixture: MixtureConfig = Field(default_factory=MixtureConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    methods: list[MethodConfig] = Field(
        default_factory=lambda: [MethodConfig(name=n) for n in ("guilomo", "lora", "uniform", "random")],
        min_length=1,
        description="Rows of the comparison, all at the same budget.",
    )
    seeds: list[int] = Field(default=[0], min_length=1, description="One training per method and seed.")
    search_per_seed: bool = Field(
        False,
        description="A search of its own for every training seed (of seed search.seed + that seed), so that the search "
        "is compared as a strategy, like the random control. Costs one search per seed.",
    )

    @model_validator(mode="before")
    @classmethod
    def _share_top_k(cls, value: Any) -> Any:
        return share_top_k(value)

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds = {seeds} has repeats; a repeated seed is not a second observation.")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        names = [method.name for method in self.methods]
        if len(set(names)) < len(names):
            raise ValueError(f"methods has rows of the same name: {names}. Give each a name of its own.")
        if "top_k" in self.search.model_fields_set and self.search.top_k != self.mixture.top_k:
            raise ValueError(
                f"search.top_k = {self.search.top_k} contradicts mixture.top_k = {self.mixture.top_k}. Set the latter."
            )
        if self.evaluation.generate and self.task.kind != "causal_lm":
            raise ValueError(
                f"evaluation.generate = True contradicts task.kind = {self.task.kind!r}: "
                "only causal_lm writes answers. Set one or the other."
            )
        self._check_metric()
        if self.sweep.learning_rates and self.train.use_held_out:
            raise ValueError(
                "sweep.learning_rates chooses by the held-out loss, but train.use_held_out = True trains on those "
                "rows. Set train.use_held_out to false, or leave sweep.learning_rates empty."
            )
        if any(method.strategy in (SEARCHED, SHUFFLED) for method in self.methods):
            refuse_unsearchable(self.mixture.router)
        if self.search.max_experts < self.mixture.top_k:
            raise ValueError(
                f"search.max_experts = {self.search.max_experts} is below mixture.top_k = {self.mixture.top_k}. "
                "Raise the first or lower the second."
            )
        self.search = self.search.model_copy(update={"top_k": self.mixture.top_k})
        self.output = self.output or f"runs/{self.name}"
        return self

    def mixture_of(self, method: MethodConfig) -> MixtureConfig:
        """What the row attaches: the recipe's mixture, changed by what makes its method, and by the row itself."""
        parts = len(self.task.parts)
        own = METHODS[method.strategy].mixture_for(parts) if method.strategy in METHODS else {}
        return MixtureConfig.model_validate({**self.mixture.model_dump(), **own, **method.mixture})

    def _check_metric(self) -> None:
        metric, kind = self.evaluation.metric, self.task.kind
        if metric is not None and metric not in METRICS[kind]:
            raise ValueError(
                f"evaluation.metric = {metric!r} does not fit task.kind = {kind!r}: "
                f"expected one of {', '.join(METRICS[kind])}, or null."
            )
        if metric == "exact_match" and not self.evaluation.generate:
            raise ValueError(
                "evaluation.metric = 'exact_match' needs generated answers. Set evaluation.generate to true."
            )

    @property
    def folder(self) -> Path:
        return Path(self.output).expanduser()
