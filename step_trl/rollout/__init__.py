"""Dynamic truncated rollout: engines, truncation callbacks and the rollout that joins them."""

from .callbacks import AnswerConsistency, ConfidenceTruncation, RandomCut, TokenBudget
from .dynamic import DynamicTruncatedRollout
from .records import Rollout, SamplingParams
from .serial_group import SerialGroupRollout
from .truncation import Boundary, Exit, GoOn, Probe, ProbeRecord, TruncationCallback


__all__ = [
    "AnswerConsistency",
    "Boundary",
    "ConfidenceTruncation",
    "DynamicTruncatedRollout",
    "Exit",
    "GoOn",
    "Probe",
    "ProbeRecord",
    "RandomCut",
    "Rollout",
    "SamplingParams",
    "SerialGroupRollout",
    "TokenBudget",
    "TruncationCallback",
]
