"""Numbers: sampling benchmarks, grading, and the papers' metrics."""

from .benchmarks import BENCHMARKS, load_benchmark
from .evaluate import evaluate
from .metrics import accuracy_efficiency_score, compression_rate, pass_at_1
from .summary import summarize


__all__ = [
    "BENCHMARKS",
    "accuracy_efficiency_score",
    "compression_rate",
    "evaluate",
    "load_benchmark",
    "pass_at_1",
    "summarize",
]
