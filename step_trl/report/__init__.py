"""Pictures and tables: figures of evaluation and training, and the papers' results table."""

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
from .history import read_history
from .tables import budgets_table, latex_table, markdown_table, results_frame
from .trace import render_rollout


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
]
