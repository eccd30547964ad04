"""Banks of ready-made LoRA adapters: reading them, choosing among them, and making them the experts of one mixture."""

from guilomo.adapters.attached import attached
from guilomo.adapters.bank import adapters_in, describe
from guilomo.adapters.lora import LoraAdapter, LoraPair, read_adapter
from guilomo.adapters.mixture import mixture_of, named_folders
from guilomo.adapters.rocket import RocketChoice, rocket_choice
from guilomo.adapters.selection import WAYS, Candidate, Selection, select
from guilomo.adapters.shots import ShotScore, draw_shots, score_shots
from guilomo.adapters.similarity import similarity
from guilomo.adapters.training import train_only
from guilomo.adapters.xlora import load_xlora, restore_xlora, save_xlora, softmax_is_per_token, xlora_of

__all__ = [
    "WAYS",
    "Candidate",
    "LoraAdapter",
    "LoraPair",
    "RocketChoice",
    "Selection",
    "ShotScore",
    "adapters_in",
    "attached",
    "describe",
    "draw_shots",
    "load_xlora",
    "mixture_of",
    "named_folders",
    "read_adapter",
    "restore_xlora",
    "rocket_choice",
    "save_xlora",
    "score_shots",
    "select",
    "similarity",
    "softmax_is_per_token",
    "train_only",
    "xlora_of",
]
