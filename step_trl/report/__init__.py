"""Reports: figures of evaluations and trainings, and the papers' results table."""

from ..monitor.trace import render_rollout
from .figures import (
    demo_report,
    evaluation_report,
    pareto_front,
    plot_accuracy_against_tokens,
    plot_composition,
    plot_semantic_density,
    plot_training,
    plot_training_dynamics,
    training_report,
)
from .history import read_history, whole_completions
from .tables import budgets_table, latex_table, markdown_table, results_frame


__all__ = [
    "budgets_table",
    "demo_report",
    "evaluation_report",
    "latex_table",
    "markdown_table",
    "pareto_front",
    "plot_accuracy_against_tokens",
    "plot_composition",
    "plot_semantic_density",
    "plot_training",
    "plot_training_dynamics",
    "read_history",
    "render_rollout",
    "results_frame",
    "training_report",
    "whole_completions",
]
