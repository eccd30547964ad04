"""The published mixtures of low-rank experts, each as a row that runs and comparisons can have."""

from guilomo.methods.fit import filled_plan
from guilomo.methods.method import Method
from guilomo.methods.registry import METHODS, method_named

__all__ = ["METHODS", "Method", "filled_plan", "method_named"]
