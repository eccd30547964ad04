"""The page, the tables and the pictures of a comparison of many methods on many tasks."""

from guilomo.report.family.costs import plot_costs
from guilomo.report.family.differences import plot_differences
from guilomo.report.family.page import render_comparison, write_comparison
from guilomo.report.family.ranks import plot_ranks
from guilomo.report.family.sweeps import plot_sweeps

__all__ = [
    "plot_costs",
    "plot_differences",
    "plot_ranks",
    "plot_sweeps",
    "render_comparison",
    "write_comparison",
]
