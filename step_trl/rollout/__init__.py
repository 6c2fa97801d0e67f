"""Dynamic truncated rollout: engines, truncation callbacks and the rollout that joins them."""

from .dynamic import DynamicTruncatedRollout, ProbeRecord, Rollout, SamplingParams
from .truncation import ConfidenceTruncation, TruncationCallback


__all__ = [
    "ConfidenceTruncation",
    "DynamicTruncatedRollout",
    "ProbeRecord",
    "Rollout",
    "SamplingParams",
    "TruncationCallback",
]
