"""Efficiency term of Step-GRPO (Eq. 4 and 5, arXiv 2604.16890): fewer steps than the group, not fewer tokens."""

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
    Compute `-beta * tanh((k - mu) / mu)` for correct completions with k steps, where mu is the mean of k in the group.

    Completions that are not correct get 0, and so do all completions of a group without a correct one.

    Args:
        num_steps (`torch.Tensor` of shape `(B,)`):
            The number of steps k of each completion, at least 1, ordered in groups of `num_generations`.
        correct, num_generations:
            As in [`kimi_length_reward`].
        beta (`float`, *optional*, defaults to `0.5`):
            The strength of the term.
        baseline (`"correct"` or `"all"`, *optional*, defaults to `"correct"`):
            The completions over which mu is the mean.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between `-beta` and `beta`.
    """
    if baseline not in ("correct", "all"):
        raise ValueError(f"baseline: {baseline!r} is not known. Set 'correct' or 'all'.")
    steps, right = by_group("num_steps", num_steps, correct, num_generations)  # (B/G, G)
    averaged = right if baseline == "correct" else torch.ones_like(right)
    # A group without a correct completion has no mu. Any value works, since its rewards are 0.
    mean = torch.where(averaged, steps, 0).sum(1, keepdim=True) / averaged.sum(1, keepdim=True).clamp(min=1)
    rewards = -beta * torch.tanh((steps - mean) / mean)
    return torch.where(right, rewards, 0).view(-1)
