"""What a run's records say: tables for the terminal, who gained and who lost, pictures."""

from floral_peft.reports.adaptors import adaptors_in_words
from floral_peft.reports.clusters import adaptor_of_each_client, clusters_found
from floral_peft.reports.compare import Gains, gains
from floral_peft.reports.formats import FORMATS, to_csv, to_json, to_latex, to_markdown
from floral_peft.reports.matrix import Cell, Matrix, Spread, matrix
from floral_peft.reports.page import draw, task_figures, to_html
from floral_peft.reports.paper import paper_figure
from floral_peft.reports.pictures import plot_curves, plot_mixtures
from floral_peft.reports.runs import Run, read_run, read_runs
from floral_peft.reports.saving import DPI, has_router, num_parameters, save_run, write_settings
from floral_peft.reports.table import common_metric, comparison, format_table


__all__ = [
    "DPI",
    "FORMATS",
    "Cell",
    "Gains",
    "Matrix",
    "Run",
    "Spread",
    "adaptor_of_each_client",
    "adaptors_in_words",
    "clusters_found",
    "common_metric",
    "comparison",
    "draw",
    "format_table",
    "gains",
    "has_router",
    "matrix",
    "num_parameters",
    "paper_figure",
    "plot_curves",
    "plot_mixtures",
    "read_run",
    "read_runs",
    "save_run",
    "task_figures",
    "to_csv",
    "to_html",
    "to_json",
    "to_latex",
    "to_markdown",
    "write_settings",
]
