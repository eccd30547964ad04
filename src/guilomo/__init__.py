"""guilomo: mixtures of LoRA experts whose allocation is searched. Importing it makes PEFT know the tuner."""

from guilomo.allocation import Allocation, ModulePlan, ModuleShape
from guilomo.errors import GuilomoError
from guilomo.tuner import LoraMoeConfig

__version__ = "0.1.0"

__all__ = ["Allocation", "GuilomoError", "LoraMoeConfig", "ModulePlan", "ModuleShape", "__version__"]
