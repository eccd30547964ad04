"""The PEFT tuner: `LoraMoeConfig` attaches packed mixtures of LoRA experts to any transformers model."""

from guilomo.tuner.biases import update_router_biases
from guilomo.tuner.config import LoraMoeConfig
from guilomo.tuner.context import TASKS, RoutingContext, SelectionMasks, context_of, knows_tasks, tasks_given
from guilomo.tuner.feed_forward import FeedForwardLayer
from guilomo.tuner.fixed_gates import fixed_gates, task_gates
from guilomo.tuner.layer import LoraMoeLayer
from guilomo.tuner.model import LoraMoeModel
from guilomo.tuner.modules import adaptable_modules, target_shapes
from guilomo.tuner.preservation import add_preservation, expert_weights, preservation_loss
from guilomo.tuner.registration import register
from guilomo.tuner.resolve import plan_for_router
from guilomo.tuner.stages import follow_training

register()

__all__ = [
    "TASKS",
    "FeedForwardLayer",
    "LoraMoeConfig",
    "LoraMoeLayer",
    "LoraMoeModel",
    "RoutingContext",
    "SelectionMasks",
    "adaptable_modules",
    "add_preservation",
    "context_of",
    "expert_weights",
    "fixed_gates",
    "follow_training",
    "knows_tasks",
    "plan_for_router",
    "preservation_loss",
    "target_shapes",
    "task_gates",
    "tasks_given",
    "update_router_biases",
]
