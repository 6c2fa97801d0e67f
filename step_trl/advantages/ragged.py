"""Advantages and weights of groups of different sizes (GVM, arXiv 2505.02391)."""

from __future__ import annotations

import torch


def ragged_advantages(rewards: torch.Tensor, groups: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """
    Return GRPO's advantages `(B,)` for groups of any size: the reward less the group's mean, over its deviation.

    The deviation has Bessel's correction, plus 1e-6. A group of one has a mean of 0 and a deviation of 1.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            The reward of each completion.
        groups (`torch.Tensor` of shape `(B,)`):
            The id of each completion's group.
        counted (`torch.BoolTensor` of shape `(B,)`):
            Which completions belong to their group. The advantages of the others are 0.
    """
    index = groups.unique(return_inverse=True)[1]
    values = torch.where(counted, rewards, 0)
    number = _sums(counted.to(rewards), index).clamp(min=1)
    mean = torch.where(number > 1, _sums(values, index) / number, 0)
    centred = torch.where(counted, values - mean[index], 0)
    deviation = torch.where(number > 1, (_sums(centred**2, index) / (number - 1).clamp(min=1)).sqrt(), 1)
    return centred / (deviation[index] + 1e-6)


def prompt_weights(groups: torch.Tensor, counted: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Return the weights `(B,)` with which a mean over tokens is a mean over prompts of means over completions of means
    over tokens, as the paper writes the M-step.

    Args:
        groups (`torch.Tensor` of shape `(B,)`):
            The id of each completion's prompt.
        counted (`torch.BoolTensor` of shape `(B,)`):
            The completions of a prompt that its mean is over.
        lengths (`torch.Tensor` of shape `(B,)`):
            The number of tokens of each completion in the loss.
    """
    prompts, index = groups.unique(return_inverse=True)
    number = _sums(counted.float(), index)[index].clamp(min=1)
    return counted * lengths.sum() / (len(prompts) * number * lengths.clamp(min=1))


def _sums(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the sum of the values of each group."""
    return values.new_zeros(int(index.max()) + 1).index_add(0, index, values)
