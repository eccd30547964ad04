"""Tables, pictures and the page of a run."""

from guilomo.report.canvas import save_figure
from guilomo.report.comparison import plot_comparison
from guilomo.report.headline import plot_headline
from guilomo.report.heatmap import plot_allocation
from guilomo.report.losses import plot_losses
from guilomo.report.page import render, write_report
from guilomo.report.router import plot_router_load
from guilomo.report.tables import allocation_table, comparison_table, parts_table
from guilomo.report.trajectories import plot_trajectories

__all__ = [
    "allocation_table",
    "comparison_table",
    "parts_table",
    "plot_allocation",
    "plot_comparison",
    "plot_headline",
    "plot_losses",
    "plot_router_load",
    "plot_trajectories",
    "render",
    "save_figure",
    "write_report",
]
