"""Every method on every task with every seed, at one budget: resumable, spread over processes, with honest tests."""

from guilomo.compare.config import CompareConfig, ComparedTask
from guilomo.compare.job import Comparison

__all__ = ["CompareConfig", "ComparedTask", "Comparison"]
