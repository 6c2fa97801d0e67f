"""Rewards: correctness, format, step efficiency and length baselines."""

from .correctness import extract_answers, math_accuracy_reward, think_answer_accuracy_reward
from .format import format_reward, think_answer_format_reward
from .length import (
    grpo_lambda_reward,
    kimi_length_reward,
    lapo_discovery_reward,
    s_grpo_reward,
    train_efficiently_reward,
)
from .relative_accuracy import mean_relative_accuracy, relative_accuracy_reward
from .step_efficiency import step_efficiency_reward
from .target_length import l1_exact_reward, l1_max_reward, lapo_internalization_reward, soft_overlong_reward


__all__ = [
    "extract_answers",
    "format_reward",
    "grpo_lambda_reward",
    "kimi_length_reward",
    "l1_exact_reward",
    "l1_max_reward",
    "lapo_discovery_reward",
    "lapo_internalization_reward",
    "math_accuracy_reward",
    "mean_relative_accuracy",
    "relative_accuracy_reward",
    "s_grpo_reward",
    "soft_overlong_reward",
    "step_efficiency_reward",
    "think_answer_accuracy_reward",
    "think_answer_format_reward",
    "train_efficiently_reward",
]
