"""`LoraMoeConfig`: the PEFT config of a mixture of low-rank experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig

from guilomo.allocation.plan import SCALINGS, Allocation
from guilomo.errors import invalid, unknown
from guilomo.files import check_checksum, refuse_pickle, write_checksum
from guilomo.layers.balance import BALANCE_FORMS, balance_options
from guilomo.layers.routers import ROUTERS, router_class, router_options
from guilomo.tuner.card import add_loading_section


class MoloraType(str, Enum):
    """PEFT type of this tuner: a string enum whose name equals its value, which is what PEFT's look-ups need."""

    MOLORA = "MOLORA"


@dataclass
class LoraMoeConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts (`guilomo.tuner`).

    Without `allocation`, every targeted module gets `num_experts` experts of rank `r`, changed by `rank_pattern`.
    With `allocation`, the plan says everything about counts, ranks, top-k, alpha and scaling. Either way the plan in
    force is stored in the adapter's config when it is saved.

    Raises:
        GuilomoError: a field has a value that cannot work; the message names the field, the value and the remedy.
    """

    num_experts: int = field(
        default=4, metadata={"help": "Experts per adapted module. More: more capacity and parameters, same top-k."}
    )
    r: int = field(default=8, metadata={"help": "Rank of each expert. Higher: more capacity and parameters."})
    top_k: int = field(
        default=2, metadata={"help": "Experts chosen per token, at most num_experts. 1 uses the probability itself."}
    )
    lora_alpha: float = field(default=16.0, metadata={"help": "Numerator of the experts' scale."})
    scaling: str = field(
        default="alpha_over_r",
        metadata={"help": "alpha_over_r, alpha_over_sqrt_r (rsLoRA) or constant (alpha itself), per expert."},
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout of the experts, one mask for all experts of a module; the router sees all of x."},
    )
    dropout_on: str = field(
        default="input",
        metadata={
            "help": "What is dropped: 'input', the features that the experts read, as in LoRA, MoLA and GuiLoMo; or "
            "'rank', their rank activations, which costs next to nothing."
        },
    )
    shared_a: bool = field(
        default=False,
        metadata={
            "help": "All experts of a module read one A of r rows (HydraLoRA, MoSLD); they must have equal ranks."
        },
    )
    drop_connect: float = field(
        default=0.0,
        metadata={"help": "Chance to drop an entry of the shared A in training, one draw per forward (MoSLD: 0.1)."},
    )
    sequential_rank: int = field(
        default=0,
        metadata={
            "help": "Rank of a second branch that reads the frozen linear's output (Hydra); needs num_experts=1. With "
            "r=0 it stands alone (SeqLoRA)."
        },
    )
    feed_forward_experts: bool = field(
        default=False,
        metadata={
            "help": "Experts of whole feed-forwards, weighted behind the nonlinearity with one router per block "
            "(MixLoRA). Modules outside of feed-forwards get plain LoRA of rank r."
        },
    )
    feed_forward_blocks: list[list[str]] | None = field(
        default=None,
        metadata={
            "help": "Names of the linears of a feed-forward in the order of running, such as ['fc1', 'fc2']; one list "
            "for each kind of block. Unset: the names that are known."
        },
    )
    router: str = field(default="topk", metadata={"help": "How experts are weighted; see docs/methods.md."})
    router_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the router by name, such as {'weights': [0.5, 0.5]} of router='fixed'."},
    )
    router_loss_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the router's own loss, where it has one; docs/methods.md says which."}
    )
    balance_loss: str | None = field(
        default="switch",
        metadata={"help": "Form, or null for none; docs/methods.md lists the forms. They differ in scale."},
    )
    balance_coefficient: float = field(
        default=0.001, metadata={"help": "Weight of the balance loss. Higher: evenly used, less specialised experts."}
    )
    balance_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the balance loss by name, where its form has some."}
    )
    balance_over: str = field(
        default="module",
        metadata={"help": "Balance each 'module' alone, or a 'layer's modules of equal expert count together (MoLA)."},
    )
    balance_reduction: str = field(
        default="sum", metadata={"help": "'sum' or 'mean' of the balance loss over modules or layers."}
    )
    z_loss_coefficient: float = field(
        default=0.0, metadata={"help": "Weight of the squared logsumexp of the router logits; keeps logits small."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of the modules to adapt, or 'all-linear'. As in PEFT's LoRA."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave out."}
    )
    rank_pattern: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Module-name regex to a rank, or to a list with each expert's rank ([]: not adapted). "
            "A module with fewer experts than top_k uses all."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save, such as a classification head."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to adapt."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, with layers_to_transform."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Kept for PEFT's tools; Conv1D layers are recognised by themselves."}
    )
    train: str = field(
        default="all",
        metadata={
            "help": "'all', or 'router': the experts stay as they are, such as ready-made adapters to be chosen from. "
            "modules_to_save are trained either way."
        },
    )
    expert_names: list[str] | None = field(
        default=None, metadata={"help": "What the experts of every module are called, such as their adapters' names."}
    )
    task_names: list[str] | None = field(
        default=None, metadata={"help": "Of tasks trained as one, their names in the order of their ids."}
    )
    bias: Literal["none"] = field(default="none", metadata={"help": "Biases are not trained; only 'none'."})
    init_lora_weights: bool = field(
        default=True, metadata={"help": "B = 0, so that training starts at the base model. False (tests): B random."}
    )
    allocation: dict[str, Any] | None = field(
        default=None, metadata={"help": "The plan: an `Allocation` or its dict. Overrides the fields above it covers."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MoloraType.MOLORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        if isinstance(self.allocation, Allocation):
            self.allocation = self.allocation.to_dict()
        self._check()

    def _check(self) -> None:
        least_rank = 0 if isinstance(self.sequential_rank, int) and self.sequential_rank > 0 else 1
        for name, low in (("num_experts", 1), ("r", least_rank), ("top_k", 1), ("sequential_rank", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise invalid(name, value, f"a whole number of at least {low}")
        if self.allocation is None and self.top_k > self.num_experts:
            raise invalid(
                "top_k", self.top_k, f"at most num_experts = {self.num_experts}", "Lower top_k or raise num_experts."
            )
        if self.sequential_rank and self.num_experts > 1 and self.allocation is None:
            raise invalid(
                "sequential_rank", self.sequential_rank, "0 beside several experts", "Set num_experts=1 and top_k=1."
            )
        for names in self.feed_forward_blocks or ():
            if not isinstance(names, (list, tuple)) or len(names) < 2 or not all(isinstance(n, str) for n in names):
                raise invalid("feed_forward_blocks", names, "lists of at least two names, the first one to run first")
        if not 0 <= self.lora_dropout < 1:
            raise invalid("lora_dropout", self.lora_dropout, "a probability in [0, 1)")
        if not 0 <= self.drop_connect < 1:
            raise invalid("drop_connect", self.drop_connect, "a probability in [0, 1)")
        if self.drop_connect and not self.shared_a:
            raise invalid("drop_connect", self.drop_connect, "0 unless shared_a=True", "Set shared_a=True.")
        if self.bias != "none":
            raise invalid("bias", self.bias, "'none'", "Name the modules whose biases to train in modules_to_save.")
        for name in ("balance_coefficient", "z_loss_coefficient", "router_loss_coefficient"):
            if not getattr(self, name) >= 0:
                raise invalid(name, getattr(self, name), "a number of at least 0")
        router_class(self.router)
        choices = {
            "scaling": SCALINGS,
            "dropout_on": ("input", "rank"),
            "train": ("all", "router"),
            "balance_over": ("module", "layer"),
            "balance_reduction": ("sum", "mean"),
            "balance_loss": (*BALANCE_FORMS, None),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, str(getattr(self, name)), [str(a) for a in allowed])
        self.check_names()
        if self.train == "router" and self.router == "fixed":
            raise invalid(
                "train", "router", "'all' with router='fixed', which has nothing to train", "Or train 'topk'."
            )
        router_options(self.router, self.router_options)
        balance_options(self.balance_loss, self.balance_options)
        self._check_router()

    def _check_router(self) -> None:
        """Refuses what the router cannot be combined with."""
        kind = router_class(self.router)
        losses = {"balance_loss": self.balance_coefficient, "z_loss_coefficient": self.z_loss_coefficient}
        for name, coefficient in losses.items():
            if not kind.balanced and coefficient > 0 and getattr(self, name):
                off = "null" if name == "balance_loss" else "0"
                reason = f"{off} with router={self.router!r}, which takes no such loss"
                raise invalid(name, getattr(self, name), reason, f"Set {name} to {off}.")
        if self.router_loss_coefficient > 0 and not kind.own_loss:
            with_one = ", ".join(name for name, other in ROUTERS.items() if other.own_loss)
            reason = f"0 with router={self.router!r}, which has no loss of its own (those that do: {with_one})"
            raise invalid("router_loss_coefficient", self.router_loss_coefficient, reason)
        if kind.reads_ranks and self.lora_dropout > 0 and self.dropout_on == "input":
            remedy = "The router reads the rank activations: set lora_dropout to 0 or dropout_on to 'rank'."
            raise invalid("lora_dropout", self.lora_dropout, f"0 with router={self.router!r}", remedy)

    def check_names(self) -> None:
        """Refuses names of experts that are not one for each expert of every adapted module.

        Raises:
            GuilomoError: see above.
        """
        names = self.expert_names
        if names is None:
            return
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise invalid("expert_names", names, "different names, none of them empty")
        plan = self.plan
        counts = {self.num_experts} if plan is None else {module.experts for module in plan.adapted().values()}
        if counts != {len(names)}:
            raise invalid("expert_names", names, f"as many names as every module has experts: {sorted(counts)}")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; also tells in the folder's README how another process loads the adapter, and writes the checksum
        of the weights, which PEFT has saved before its config."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(Path(save_directory), self.base_model_name_or_path)
        write_checksum(Path(save_directory))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoraMoeConfig:
        """As in PEFT; looks at the weights beside a local config first, for PEFT loads them next.

        Raises:
            GuilomoError: they are pickled, or do not match their checksum.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        refuse_pickle(folder)
        check_checksum(folder)
        config: LoraMoeConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        return config

    @property
    def plan(self) -> Allocation | None:
        """The allocation as an object, or None before the adapter is attached to a model."""
        return None if self.allocation is None else Allocation.from_dict(self.allocation)
