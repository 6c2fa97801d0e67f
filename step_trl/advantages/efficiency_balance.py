"""Correctness and length as two advantages, weighted by what each can still gain (LEAD, arXiv 2605.09806)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


_EPS = 1e-8


class Signal(NamedTuple):
    """The mean and the deviation of a reward over a batch of groups."""

    mean: float
    deviation: float


def length_targets(
    lengths: torch.Tensor, correct: torch.Tensor, num_generations: int, shortest: float, longest: float
) -> torch.Tensor:
    """
    Return the length `(B,)` that the completions of each group are compared with.

    It is the mean length of the group's correct completions, at least `shortest` and at most `longest`. For a group
    without one it is `longest`, which asks for longer thoughts.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`), correct (`torch.BoolTensor` of shape `(B,)`):
            The number of tokens of each completion, and whether it is correct.
        num_generations (`int`):
            The number of completions per group.
        shortest (`float`), longest (`float`):
            The bounds of the target, in tokens.
    """
    counted = correct.view(-1, num_generations).float()
    number = counted.sum(dim=1)
    mean = (lengths.view(-1, num_generations) * counted).sum(dim=1) / number.clamp(min=1)
    targets = torch.where(number > 0, mean.clamp(shortest, longest), longest)
    return targets.repeat_interleave(num_generations)


def length_efficiency(lengths: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return 1 for a completion of the target's length, less by its relative distance, and at least -1."""
    return (1 - (lengths - targets).abs() / targets).clamp(min=-1)


def group_advantages(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Return the rewards `(B,)` less their group's mean, over its unbiased deviation plus 1e-6."""
    groups = rewards.view(-1, num_generations)
    return ((groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-6)).flatten()


def batch_signal(rewards: torch.Tensor, counted: torch.Tensor, num_generations: int) -> Signal:
    """
    Return the mean of the groups' means, and the deviation: the root of their mean variance plus the variance of their
    means. Groups without a counted completion are left out; without any, there is no signal, and both are 0.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`), counted (`torch.BoolTensor` of shape `(B,)`):
            The reward of each completion, and whether it counts.
        num_generations (`int`):
            The number of completions per group.
    """
    weights = counted.view(-1, num_generations).double()
    number = weights.sum(dim=1)
    if not number.any():
        return Signal(0.0, 0.0)
    kept = number > 0
    weights = weights[kept] / number[kept, None]
    groups = rewards.view(-1, num_generations)[kept].double()
    means = (groups * weights).sum(dim=1)
    variances = ((groups - means[:, None]) ** 2 * weights).sum(dim=1)
    total = variances.mean() + means.var(correction=0) + _EPS
    return Signal(means.mean().item(), math.sqrt(total.item()))


def correctness_share(correctness: Signal, efficiency: Signal) -> float:
    """
    Return how much of a batch's gain is to be had by correctness rather than by length, from 0 to 1.

    Each reward counts by its coefficient of variation, relative to the other's, times what it lacks to its best value.

    Args:
        correctness ([`Signal`]):
            Of correctness, 0 or 1, over all completions.
        efficiency ([`Signal`]):
            Of [`length_efficiency`], over the correct completions.
    """
    variations = [signal.deviation / (abs(signal.mean) + _EPS) for signal in (correctness, efficiency)]
    total = sum(variations)
    lacking = (1 - _clamp(correctness.mean, 0, 1), 1 - (_clamp(efficiency.mean, -1, 1) + 1) / 2)
    demands = [variation / total * lack if total else 0.0 for variation, lack in zip(variations, lacking, strict=True)]
    return demands[0] / (sum(demands) + _EPS)


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
