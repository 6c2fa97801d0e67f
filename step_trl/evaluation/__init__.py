"""Evaluation: sampling benchmarks, grading, and the papers' metrics."""

from ..text import split_steps
from .benchmarks import BENCHMARKS, load_benchmark
from .chat import ChatError
from .composition import classify_testbed_steps, composition
from .consistency import ConsistencyJudge
from .evaluate import evaluate
from .judge import Estimate, StepJudge
from .metrics import accuracy_efficiency_score, compression_rate, pass_at_1
from .store import read_samples
from .summary import summarize


__all__ = [
    "BENCHMARKS",
    "ChatError",
    "ConsistencyJudge",
    "Estimate",
    "StepJudge",
    "accuracy_efficiency_score",
    "classify_testbed_steps",
    "composition",
    "compression_rate",
    "evaluate",
    "load_benchmark",
    "pass_at_1",
    "read_samples",
    "split_steps",
    "summarize",
]
