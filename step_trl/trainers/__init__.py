"""Trainers: a configuration and the wiring of three overrides each."""

from .base_config import EfficientReasoningConfig
from .efficient import EfficientReasoningTrainer
from .sas import SASTrainer
from .sas_config import SASConfig, StepSelection
from .step_grpo import StepGRPOTrainer
from .step_grpo_config import StepGRPOConfig


__all__ = [
    "EfficientReasoningConfig",
    "EfficientReasoningTrainer",
    "SASConfig",
    "SASTrainer",
    "StepGRPOConfig",
    "StepGRPOTrainer",
    "StepSelection",
]
