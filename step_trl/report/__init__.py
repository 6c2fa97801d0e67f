"""Pictures: figures of evaluation and training."""

from .figures import demo_report, plot_accuracy_against_tokens, plot_training


__all__ = ["demo_report", "plot_accuracy_against_tokens", "plot_training"]
