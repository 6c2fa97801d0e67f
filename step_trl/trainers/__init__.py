"""Trainers: a configuration and the wiring of three overrides each."""

from .sas import SASConfig, SASTrainer, StepSelection
from .step_grpo import StepGRPOTrainer
from .step_grpo_config import StepGRPOConfig


__all__ = ["SASConfig", "SASTrainer", "StepGRPOConfig", "StepGRPOTrainer", "StepSelection"]
