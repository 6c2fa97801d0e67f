"""Trainers: a configuration and the wiring of three overrides each."""

from .sas import SASConfig, SASTrainer, StepSelection
from .step_grpo import StepGRPOConfig, StepGRPOTrainer


__all__ = ["SASConfig", "SASTrainer", "StepGRPOConfig", "StepGRPOTrainer", "StepSelection"]
