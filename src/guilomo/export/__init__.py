"""Export: a mixture as plain LoRA or as merged weights, for servers that know no mixtures, and what that loses."""

from guilomo.export.factors import Factors, padded, stacked, truncated
from guilomo.export.gates import mean_gates, mixture_config, mixture_layers, refuse_routed, routed_layers
from guilomo.export.lora import LoraExport, plain_lora
from guilomo.export.measure import Measurement, compare
from guilomo.export.plain import merged_copy, unadapted_copy
from guilomo.export.words import card, sentences

__all__ = [
    "Factors",
    "LoraExport",
    "Measurement",
    "card",
    "compare",
    "mean_gates",
    "merged_copy",
    "mixture_config",
    "mixture_layers",
    "padded",
    "plain_lora",
    "refuse_routed",
    "routed_layers",
    "sentences",
    "stacked",
    "truncated",
    "unadapted_copy",
]
