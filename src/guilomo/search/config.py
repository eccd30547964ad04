"""Options of the search."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Relaxation = Literal["survival", "prefix"]
Masks = Literal["sampled", "soft", "hard"]
HypergradientName = Literal["first_order", "unrolled", "exact", "authors_code"]


class SearchConfig(BaseModel):
    """How the bilevel search runs. Field descriptions are the CLI's help."""

    model_config = ConfigDict(extra="forbid")

    max_experts: int = Field(4, ge=1, description="Experts each module starts with; the search chooses up to this.")
    max_rank: int = Field(8, ge=1, description="Rank each expert starts with; the search chooses up to this.")
    top_k: int = Field(2, ge=1, description="Experts chosen per token, during the search and afterwards.")
    relaxation: Relaxation = Field(
        "survival",
        description="survival: a count is reached by its chance, so growing and shrinking both have a gradient (ours). "
        "prefix: the paper's straight-through.",
    )
    masks: Masks = Field(
        "sampled",
        description="survival only. sampled: every row draws its counts from the preference, and what is not drawn is "
        "off. soft: everything takes part by its chance, which weights can undo by growing. hard: on from a chance of "
        "one half.",
    )
    hypergradient: HypergradientName = Field(
        "first_order",
        description="first_order: one pass over a split batch. unrolled: one step looked ahead, by a difference "
        "(about 3 times the cost). exact: autograd, small models only. authors_code: what the released code computes.",
    )
    steps: int = Field(300, ge=1, description="Weight steps of the search. More: a better-informed allocation.")
    warmup_steps: int = Field(
        100,
        ge=0,
        description="Weight steps before the first outer step, with everything on; unset: a third of `steps`. Experts "
        "that have learned nothing have nothing to say.",
    )
    outer_every: int = Field(2, ge=1, description="An outer step every this many weight steps.")
    batch_size: int = Field(16, ge=1, description="Training rows per step, over all processes.")
    held_out_batch_size: int = Field(
        16,
        ge=1,
        description="Held-out rows per outer step, over all processes; each seen under two draws where expert counts "
        "are sampled.",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Optimiser of the weights.")
    learning_rate: float = Field(1e-3, gt=0, description="Of the weights; falls linearly to a tenth after warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Of the weights.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clips the weights' gradient norm; null: no clipping.")
    outer_learning_rate: float = Field(
        0.1, gt=0, description="Adam step of the selection vectors. Higher: decides faster, on less evidence."
    )
    outer_betas: tuple[float, float] = Field((0.9, 0.99), description="Adam betas of the selection vectors.")
    outer_loss: Literal["log", "mean"] = Field(
        "log", description="Held-out loss the selection vectors descend; log makes its gradient scale-free."
    )
    temperature: float = Field(1.0, gt=0, description="Of the softmax over counts at the start of the search.")
    final_temperature: float = Field(
        1.0, gt=0, description="At the end, reached geometrically. Below `temperature`: counts become certain."
    )
    budget_weight: float = Field(
        1.0, ge=0, description="Weight of (expected parameters / budget - 1)^2; the end is projected exactly anyway."
    )
    min_experts: int | None = Field(
        None, ge=0, description="Fewest experts per module; unset: top_k. 0 lets modules go unadapted."
    )
    check_every: int = Field(10, ge=1, description="Outer steps between looks at the allocation (early stop).")
    patience: int = Field(
        5, ge=0, description="Stop when the allocation moved less than 1 % over this many looks; 0: never."
    )
    checkpoint_every: int = Field(
        1,
        ge=1,
        description="Steps between checkpoints; a killed run repeats at most that many. A save costs about 2 % of a "
        "step of MiniLM on a CPU; raise this where it costs more.",
    )
    record_every: int = Field(4, ge=1, description="Steps between records of the trajectories.")
    seed: int = Field(0, ge=0, description="Of the data order, drawn masks, dropout and initial weights.")

    @model_validator(mode="before")
    @classmethod
    def _warm_up_for_a_third(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("steps"), int) and "warmup_steps" not in value:
            return {**value, "warmup_steps": value["steps"] // 3}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if self.max_experts < self.top_k:
            raise ValueError(
                f"max_experts = {self.max_experts} is below top_k = {self.top_k}. Raise max_experts or lower top_k."
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} leaves no outer step in steps = {self.steps}. Lower warmup_steps."
            )
        if self.relaxation == "prefix" and self.min_experts == 0:
            raise ValueError("min_experts = 0 needs relaxation = 'survival'; 'prefix' keeps at least one expert.")
        if (self.min_experts or 0) > self.max_experts:
            raise ValueError(
                f"min_experts = {self.min_experts} is above max_experts = {self.max_experts}. "
                "Lower it or raise max_experts."
            )
        return self

    @property
    def least_experts(self) -> int:
        """Fewest experts the search may leave a module: `min_experts`, or top-k; 0 is a module that goes unadapted."""
        return self.top_k if self.min_experts is None else self.min_experts

    @property
    def top_k_floor(self) -> bool:
        """Whether every adapted module keeps at least top-k experts."""
        return self.least_experts >= self.top_k
