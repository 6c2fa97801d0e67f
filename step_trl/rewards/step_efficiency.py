"""Efficiency term of Step-GRPO (Eq. 4 and 5, arXiv 2604.16890): fewer steps than one's group, not fewer tokens."""

from __future__ import annotations

from typing import Literal

import torch

from .groups import by_group


Baseline = Literal["correct", "all"]


def step_efficiency_reward(
    num_steps: torch.Tensor,
    correct: torch.Tensor,
    num_generations: int,
    beta: float = 0.5,
    baseline: Baseline = "correct",
) -> torch.Tensor:
    """
    `-beta * tanh((k - mu) / mu)` for correct completions, where k counts the steps and mu is their mean in the group.

    Completions that are not correct get 0, and so do all of a group without a correct one.

    Args:
        num_steps (`torch.Tensor` of shape `(B,)`):
            k of each completion, at least 1; groups of `num_generations` follow each other.
        correct (`torch.BoolTensor` of shape `(B,)`):
            Whether the answer is right.
        num_generations (`int`):
            Completions per group.
        beta (`float`, *optional*, defaults to `0.5`):
            Strength of the term.
        baseline (`"correct"` or `"all"`, *optional*, defaults to `"correct"`):
            Completions that mu is the mean of.

    Returns:
        `torch.Tensor` of shape `(B,)`: rewards between `-beta` and `beta`.
    """
    if baseline not in ("correct", "all"):
        raise ValueError(f"baseline: {baseline!r} is not known. Set 'correct' or 'all'.")
    steps, right = by_group("num_steps", num_steps, correct, num_generations)  # (B/G, G)
    averaged = right if baseline == "correct" else torch.ones_like(right)
    # a group without a correct completion has no mu; any will do, since its rewards are 0
    mean = torch.where(averaged, steps, 0).sum(1, keepdim=True) / averaged.sum(1, keepdim=True).clamp(min=1)
    rewards = -beta * torch.tanh((steps - mean) / mean)
    return torch.where(right, rewards, 0).view(-1)
