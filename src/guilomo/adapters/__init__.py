"""Banks of ready-made LoRA adapters: reading them, choosing among them, and making them the experts of one mixture."""

from guilomo.adapters.lora import LoraAdapter, LoraPair, read_adapter
from guilomo.adapters.mixture import mixture_of, named_folders
from guilomo.adapters.training import train_only

__all__ = ["LoraAdapter", "LoraPair", "mixture_of", "named_folders", "read_adapter", "train_only"]
