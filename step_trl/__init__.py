"""Efficient-reasoning variants of TRL's `GRPOTrainer`: Step-GRPO and SAS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._compat import check_trl_version, silence_triton_check
from ._version import __version__


check_trl_version()
silence_triton_check()

if TYPE_CHECKING:
    from .trainers import (
        EfficientReasoningConfig,
        EfficientReasoningTrainer,
        SASConfig,
        SASTrainer,
        StepGRPOConfig,
        StepGRPOTrainer,
        StepSelection,
    )

__all__ = [
    "EfficientReasoningConfig",
    "EfficientReasoningTrainer",
    "SASConfig",
    "SASTrainer",
    "StepGRPOConfig",
    "StepGRPOTrainer",
    "StepSelection",
    "__version__",
]


def __getattr__(name: str):
    # The trainers import torch and TRL, which takes seconds: segmenters, rewards and grading do without.
    if name in __all__:
        from . import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
