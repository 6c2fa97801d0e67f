"""Pictures and tables: figures of evaluation and training, and the papers' results table."""

from .figures import demo_report, evaluation_report, plot_accuracy_against_tokens, plot_training
from .tables import latex_table, markdown_table, results_frame
from .trace import render_rollout


__all__ = [
    "demo_report",
    "evaluation_report",
    "latex_table",
    "markdown_table",
    "plot_accuracy_against_tokens",
    "plot_training",
    "render_rollout",
    "results_frame",
]
