"""The main job from a recipe: search, train every method at one budget, compare, report; resumable stage by stage."""

from guilomo.run.config import RunConfig
from guilomo.run.pipeline import Run
from guilomo.run.recipe import load_recipe

__all__ = ["Run", "RunConfig", "load_recipe"]
