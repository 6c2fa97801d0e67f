"""Rewards that only arms of the study have."""

from step_trl.rewards import math_accuracy_reward

from .arms import SHORT_CONTEXT


def priced_reward(completion_ids, **inputs):
    """Return the correctness, less 0.4 for a correct completion that fills the short context."""
    correct = math_accuracy_reward(**inputs)
    return [value * (1 - 0.4 * len(ids) / SHORT_CONTEXT) for value, ids in zip(correct, completion_ids, strict=True)]
