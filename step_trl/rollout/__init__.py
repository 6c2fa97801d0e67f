"""Dynamic truncated rollouts: engines sample completions, and truncation callbacks end them early."""

from .allocation import fill_batches, filter_ratios, gvm_weights, preserve_sum
from .answer_probes import AnswerProbes, ProbedThought, forced_answer
from .callbacks import AnswerConsistency, ConfidenceTruncation, RandomCut, TokenBudget
from .dynamic import DynamicTruncatedRollout
from .records import Rollout, SamplingParams
from .serial_group import SerialGroupRollout
from .tree import Segment, TreeRollout, path_to
from .truncation import Boundary, Exit, GoOn, Probe, ProbeRecord, TruncationCallback


__all__ = [
    "AnswerConsistency",
    "AnswerProbes",
    "Boundary",
    "ConfidenceTruncation",
    "DynamicTruncatedRollout",
    "Exit",
    "GoOn",
    "Probe",
    "ProbeRecord",
    "ProbedThought",
    "RandomCut",
    "Rollout",
    "SamplingParams",
    "Segment",
    "SerialGroupRollout",
    "TokenBudget",
    "TreeRollout",
    "TruncationCallback",
    "fill_batches",
    "filter_ratios",
    "forced_answer",
    "gvm_weights",
    "path_to",
    "preserve_sum",
]
