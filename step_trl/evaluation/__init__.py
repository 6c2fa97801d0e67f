"""Numbers: sampling benchmarks, grading, and the papers' metrics."""

from .evaluate import evaluate, summarize
from .metrics import accuracy_efficiency_score, compression_rate, pass_at_1


__all__ = ["accuracy_efficiency_score", "compression_rate", "evaluate", "pass_at_1", "summarize"]
