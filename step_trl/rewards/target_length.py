"""Rewards for completions that keep to the length that their prompt asks for, each independent of the others."""

from __future__ import annotations

import torch


def _floats(lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not len(lengths) == len(correct) == len(targets):
        raise ValueError(
            f"targets: {len(lengths)} lengths, {len(correct)} correct and {len(targets)} targets differ in number. "
            "Pass one target per completion."
        )
    kind = torch.promote_types(lengths.dtype, torch.float32)
    return lengths.to(kind), correct.to(kind), targets.to(kind)


def soft_overlong_reward(
    lengths: torch.Tensor, max_completion_length: int, soft_punish_cache: int | None = None
) -> torch.Tensor:
    """
    Compute TRL's penalty for completions close to the maximum length (DAPO, arXiv 2503.14476, eq. 13).

    Args:
        lengths (`torch.Tensor` of shape `(B,)`), max_completion_length (`int`):
            The number of tokens of each completion, and the maximum number.
        soft_punish_cache (`int`, *optional*):
            The number of tokens before the maximum over which the penalty grows from 0 to -1. By default, a fifth of
            `max_completion_length`, as in DAPO.

    Returns:
        `torch.Tensor` of shape `(B,)`: The penalties, between -1 and 0, to be added to the correctness.
    """
    from trl.rewards import get_soft_overlong_punishment  # takes seconds to import

    cache = max_completion_length // 5 if soft_punish_cache is None else soft_punish_cache
    punish = get_soft_overlong_punishment(max_completion_length, cache)
    return torch.tensor(punish([range(length) for length in lengths.tolist()]), device=lengths.device)


def l1_exact_reward(
    lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor, alpha: float = 0.0003
) -> torch.Tensor:
    """
    Compute the reward of L1-Exact (arXiv 2503.04697): `correct - alpha * |target - length|`.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`), correct (`torch.BoolTensor` of shape `(B,)`):
            The number of tokens of each completion, and whether its answer is correct.
        targets (`torch.Tensor` of shape `(B,)`):
            The number of tokens that each prompt asks for.
        alpha (`float`, *optional*, defaults to `0.0003`):
            The cost of each token too many or too few.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, at most 1, including the correctness.
    """
    tokens, right, wanted = _floats(lengths, correct, targets)
    return right - alpha * (wanted - tokens).abs()


def l1_max_reward(
    lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor, alpha: float = 0.0003, delta: float = 0.5
) -> torch.Tensor:
    """
    Compute the reward of L1-Max (arXiv 2503.04697): `correct * clip(delta + alpha / 2 * (target - length), 0, 1)`.

    Args:
        lengths, correct, targets:
            As in [`l1_exact_reward`]. The targets are maxima.
        alpha (`float`, *optional*, defaults to `0.0003`):
            Twice the cost of a token.
        delta (`float`, *optional*, defaults to `0.5`):
            The reward of a correct completion with exactly the target length.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between 0 and 1, including the correctness.
    """
    tokens, right, wanted = _floats(lengths, correct, targets)
    return right * (delta + alpha / 2 * (wanted - tokens)).clamp(0, 1)


def lapo_internalization_reward(
    lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor, weight: float = 0.8, sigma: float = 120
) -> torch.Tensor:
    """
    Compute the reward of LAPO's second stage (arXiv 2507.15758, eq. 6 and 7), for the length that the thought states.

    A correct completion gets `1 + weight * exp(-(length - target)^2 / (2 * sigma^2))`, a wrong one 0.

    Args:
        lengths, correct, targets:
            As in [`l1_exact_reward`]. The targets are those that the opening of each thought states.
        weight (`float`, *optional*, defaults to `0.8`):
            The largest reward for length.
        sigma (`float`, *optional*, defaults to `120`):
            The standard deviation in tokens.

    Returns:
        `torch.Tensor` of shape `(B,)`: The rewards, between 0 and `1 + weight`, including the correctness.
    """
    tokens, right, wanted = _floats(lengths, correct, targets)
    return right * (1 + weight * torch.exp(-(tokens - wanted).square() / (2 * sigma**2)))
