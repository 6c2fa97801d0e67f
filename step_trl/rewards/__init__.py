"""Rewards: correctness, format, step efficiency and length baselines."""

from .correctness import math_accuracy_reward
from .efficiency import step_efficiency_reward
from .format import format_reward
from .length import grpo_lambda_reward, kimi_length_reward


__all__ = [
    "format_reward",
    "grpo_lambda_reward",
    "kimi_length_reward",
    "math_accuracy_reward",
    "step_efficiency_reward",
]
