"""Fine-tuning with transformers' Trainer, and the callbacks that any Trainer can use."""

from guilomo.training.accumulation import AccumulationCallback
from guilomo.training.biases import RouterBiasCallback
from guilomo.training.callbacks import DivergedError, FiniteLossCallback, ProgressCallback, RouterHealthCallback
from guilomo.training.config import TrainConfig
from guilomo.training.fine_tune import Interrupted, TrainResult, fine_tune, training_arguments
from guilomo.training.stages import RouterStageCallback

__all__ = [
    "AccumulationCallback",
    "DivergedError",
    "FiniteLossCallback",
    "Interrupted",
    "ProgressCallback",
    "RouterBiasCallback",
    "RouterHealthCallback",
    "RouterStageCallback",
    "TrainConfig",
    "TrainResult",
    "fine_tune",
    "training_arguments",
]
