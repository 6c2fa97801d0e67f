"""Rewards relative to their group, to be normalised over the batch (DLER, arXiv 2510.15110)."""

from __future__ import annotations

import torch


def centred_rewards(rewards: torch.Tensor, num_generations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the rewards `(B,)` less their group's mean, and which completions `(B,)` are in a group with different ones.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            The reward of each completion.
        num_generations (`int`):
            The number of completions per group.
    """
    groups = rewards.view(-1, num_generations)
    differ = (groups != groups[:, :1]).any(dim=1)
    return (groups - groups.mean(dim=1, keepdim=True)).flatten(), differ.repeat_interleave(num_generations)
