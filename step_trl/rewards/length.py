"""Rewards for completions that are short for their group. All need whole groups, gathered from all processes."""

from __future__ import annotations

from fractions import Fraction

import torch

from .groups import by_group


def kimi_length_reward(lengths: torch.Tensor, correct: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Compute the length term of Kimi k1.5 (arXiv 2501.12599), to be added to the correctness with a weight.

    With `lam = 0.5 - (length - min) / (max - min)`, where min and max are over the whole group, right and wrong,
    correct completions get `lam` and the others `min(0, lam)`. If all lengths of a group are equal, all get 0.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`), correct (`torch.BoolTensor` of shape `(B,)`):
            The number of tokens of each completion, and whether its answer is correct.
        num_generations (`int`):
            The number of completions per group. Groups are consecutive.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between -0.5 and 0.5.
    """
    tokens, right = by_group("lengths", lengths, correct, num_generations)
    shortest, longest = tokens.amin(1, keepdim=True), tokens.amax(1, keepdim=True)
    spread = longest - shortest
    lam = 0.5 - (tokens - shortest) / torch.where(spread > 0, spread, 1)
    rewards = torch.where(right, lam, lam.clamp(max=0))
    return torch.where(spread > 0, rewards, 0).view(-1)


def grpo_lambda_reward(
    lengths: torch.Tensor,
    correct: torch.Tensor,
    num_generations: int,
    top_ratio: float = 0.2,
    alpha: float = 0.1,
) -> torch.Tensor:
    """
    Compute the reward of GRPO-lambda (arXiv 2505.18086): only the best groups are rewarded for being short.

    The groups are ranked by their share of correct completions, ties by position. The first
    `floor(top_ratio * number of groups)` groups, and at least one, get [`train_efficiently_reward`]. In the others, a
    correct completion gets 1, and a wrong one 0.

    Args:
        lengths, correct, num_generations:
            As in [`kimi_length_reward`], for the global batch.
        top_ratio (`float`, *optional*, defaults to `0.2`):
            The share of groups whose lengths count, greater than 0 and at most 1.
        alpha (`float`, *optional*, defaults to `0.1`):
            The largest penalty for length.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between 0 and 1, including the correctness.
    """
    if not 0 < top_ratio <= 1:
        raise ValueError(f"top_ratio: {top_ratio} is not in (0, 1]. Set a share of the groups, for example 0.2.")
    tokens, right = by_group("lengths", lengths, correct, num_generations)
    wanted = Fraction(top_ratio).limit_denominator(10**9) * len(right)
    order = right.sum(1).argsort(descending=True, stable=True)
    top = torch.zeros_like(right[:, :1])
    top[order[: max(1, int(wanted))]] = True
    rewards = torch.where(top, 1 - alpha * _relative_length(tokens, right), 1)
    return torch.where(right, rewards, 0).view(-1)


def _relative_length(tokens: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `sigmoid((length - mean) / std)` `(B / G, G)`, relative to the correct completions of each group."""
    number = right.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(right, tokens, 0).sum(1, keepdim=True) / number
    deviation = torch.where(right, tokens - mean, 0)
    std = (deviation.square().sum(1, keepdim=True) / number).sqrt()
    return torch.sigmoid(deviation / torch.where(std > 0, std, 1))


def train_efficiently_reward(
    lengths: torch.Tensor,
    correct: torch.Tensor,
    num_generations: int,
    ended: torch.Tensor | None = None,
    alpha: float = 0.1,
) -> torch.Tensor:
    """
    Compute the reward of "Training language models to reason efficiently" (arXiv 2502.04463).

    A correct completion gets `1 - alpha * sigmoid((length - mean) / std)`, with the mean and (population) standard
    deviation of the correct completions of its group. If these have equal lengths, or there is only one, the sigmoid
    is that of 0. Wrong completions get 0. So do completions that were cut off, which do not count in mean and
    deviation.

    Args:
        lengths, correct, num_generations:
            As in [`kimi_length_reward`].
        ended (`torch.BoolTensor` of shape `(B,)`, *optional*):
            Whether each completion ended with the EOS token. By default, all did.
        alpha (`float`, *optional*, defaults to `0.1`):
            The largest penalty for length.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between 0 and 1, including the correctness.
    """
    tokens, right = by_group(
        "lengths", lengths, correct if ended is None else correct.bool() & ended.bool(), num_generations
    )
    return torch.where(right, 1 - alpha * _relative_length(tokens, right), 0).view(-1)


def lapo_discovery_reward(
    lengths: torch.Tensor,
    correct: torch.Tensor,
    num_generations: int,
    weight: float = 0.7,
    low: float = 0.3,
    high: float = 0.7,
    decay: float = 100,
) -> torch.Tensor:
    """
    Compute the reward of LAPO's first stage (arXiv 2507.15758, eq. 2, 4 and 5), for lengths usual for the problem.

    A correct completion gets `1 + weight` if its length is between two quantiles of the lengths of the correct
    completions of its group (with linear interpolation). Outside of them it gets less, down to 1 at a distance of
    `decay` tokens. Wrong completions get 0.

    Args:
        lengths, correct, num_generations:
            As in [`kimi_length_reward`].
        weight (`float`, *optional*, defaults to `0.7`):
            The largest reward for length.
        low (`float`, *optional*, defaults to `0.3`), high (`float`, *optional*, defaults to `0.7`):
            The two quantiles.
        decay (`float`, *optional*, defaults to `100`):
            The distance in tokens at which length earns nothing.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between 0 and `1 + weight`, including the correctness.
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low, high: {low} and {high} are not valid quantiles. Set 0 <= low <= high <= 1.")
    tokens, right = by_group("lengths", lengths, correct, num_generations)
    shortest, longest = (
        torch.where(right, tokens, torch.nan).nanquantile(quantile, dim=1, keepdim=True) for quantile in (low, high)
    )
    distance = torch.maximum(shortest - tokens, tokens - longest).clamp(min=0)
    return torch.where(right, 1 + weight * (1 - distance / decay).clamp(min=0), 0).view(-1)


def s_grpo_reward(correct: torch.Tensor, num_generations: int, decay: float = 0.5) -> torch.Tensor:
    """
    Compute the reward of S-GRPO (arXiv 2505.07686): the earliest correct exit from a thought earns most.

    A correct completion gets `decay ** (number of correct ones up to it - 1)`, a wrong one 0.

    Args:
        correct, num_generations:
            As in [`kimi_length_reward`], each group in the order of its exits.
        decay (`float`, *optional*, defaults to `0.5`):
            The factor between the rewards of one correct exit and the next.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between 0 and 1, including the correctness.
    """
    right = by_group("correct", correct, correct, num_generations)[1]
    return torch.where(right, decay ** (right.cumsum(1) - 1.0), 0).view(-1)
