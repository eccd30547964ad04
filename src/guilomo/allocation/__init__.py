"""Plans: which experts and ranks every module gets, what they cost, and how to choose them."""

from guilomo.allocation.blocks import FEED_FORWARDS, find_blocks
from guilomo.allocation.budget import fit, same_budget
from guilomo.allocation.chance import random_plan, shuffled
from guilomo.allocation.costs import RouterCost, linear_router, no_router
from guilomo.allocation.hilo import hilo, rank_ramp
from guilomo.allocation.learned import learned
from guilomo.allocation.mola import MOLA_SHAPES, mola
from guilomo.allocation.names import depths_of, layers_of, site
from guilomo.allocation.normal import normal
from guilomo.allocation.plan import SCALINGS, Allocation, ModuleChange, ModulePlan, ModuleShape
from guilomo.allocation.preference import Preference
from guilomo.allocation.registry import STRATEGIES, make, strategy_options
from guilomo.allocation.rules import rules
from guilomo.allocation.shared import with_shared_a
from guilomo.allocation.spectral import alphalora, alphalora_counts, hill_alpha
from guilomo.allocation.uniform import lora, uniform

__all__ = [
    "FEED_FORWARDS",
    "MOLA_SHAPES",
    "SCALINGS",
    "STRATEGIES",
    "Allocation",
    "ModuleChange",
    "ModulePlan",
    "ModuleShape",
    "Preference",
    "RouterCost",
    "alphalora",
    "alphalora_counts",
    "depths_of",
    "find_blocks",
    "fit",
    "hill_alpha",
    "hilo",
    "layers_of",
    "learned",
    "linear_router",
    "lora",
    "make",
    "mola",
    "no_router",
    "normal",
    "random_plan",
    "rank_ramp",
    "rules",
    "same_budget",
    "shuffled",
    "site",
    "strategy_options",
    "uniform",
    "with_shared_a",
]
