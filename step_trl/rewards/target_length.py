"""Rewards for completions that keep to a length that their prompt asks for. Each completion counts for itself."""

from __future__ import annotations

import torch


def _floats(lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not len(lengths) == len(correct) == len(targets):
        raise ValueError(
            f"targets: {len(lengths)} lengths, {len(correct)} correct and {len(targets)} targets differ in number. "
            "Give one target per completion."
        )
    kind = torch.promote_types(lengths.dtype, torch.float32)
    return lengths.to(kind), correct.to(kind), targets.to(kind)


def soft_overlong_reward(
    lengths: torch.Tensor, max_completion_length: int, soft_punish_cache: int | None = None
) -> torch.Tensor:
    """
    Punishment of completions near the end of their budget (DAPO, arXiv 2503.14476, eq. 13); TRL's own.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each completion.
        max_completion_length (`int`):
            The budget.
        soft_punish_cache (`int`, *optional*):
            Last tokens of the budget, over which the punishment grows from 0 to -1. By default a fifth of it, as in
            DAPO.

    Returns:
        `torch.Tensor` of shape `(B,)`: between -1 and 0, to be added to the correctness.
    """
    from trl.rewards import get_soft_overlong_punishment  # takes seconds

    cache = max_completion_length // 5 if soft_punish_cache is None else soft_punish_cache
    punish = get_soft_overlong_punishment(max_completion_length, cache)
    return torch.tensor(punish([range(length) for length in lengths.tolist()]), device=lengths.device)


def l1_exact_reward(
    lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor, alpha: float = 0.0003
) -> torch.Tensor:
    """
    Reward of L1-Exact (arXiv 2503.04697): `correct - alpha * |target - length|`.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each completion.
        correct (`torch.BoolTensor` of shape `(B,)`):
            Whether the answer is right.
        targets (`torch.Tensor` of shape `(B,)`):
            Tokens that the prompt asks for.
        alpha (`float`, *optional*, defaults to `0.0003`):
            Cost of a token too many or too few.

    Returns:
        `torch.Tensor` of shape `(B,)`: rewards of at most 1, the correctness included.
    """
    tokens, right, wanted = _floats(lengths, correct, targets)
    return right - alpha * (wanted - tokens).abs()


def l1_max_reward(
    lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor, alpha: float = 0.0003, delta: float = 0.5
) -> torch.Tensor:
    """
    Reward of L1-Max (arXiv 2503.04697): `correct * clip(delta + alpha / 2 * (target - length), 0, 1)`.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each completion.
        correct (`torch.BoolTensor` of shape `(B,)`):
            Whether the answer is right.
        targets (`torch.Tensor` of shape `(B,)`):
            Most tokens that the prompt allows.
        alpha (`float`, *optional*, defaults to `0.0003`):
            Twice what a token costs.
        delta (`float`, *optional*, defaults to `0.5`):
            Reward of a correct completion of just the target's length.

    Returns:
        `torch.Tensor` of shape `(B,)`: rewards between 0 and 1, the correctness included.
    """
    tokens, right, wanted = _floats(lengths, correct, targets)
    return right * (delta + alpha / 2 * (wanted - tokens)).clamp(0, 1)


def lapo_internalization_reward(
    lengths: torch.Tensor, correct: torch.Tensor, targets: torch.Tensor, weight: float = 0.8, sigma: float = 120
) -> torch.Tensor:
    """
    Reward of LAPO's second stage (arXiv 2507.15758, eq. 6 and 7): of the length that the thought's opening states.

    A correct completion gets `1 + weight * exp(-(length - target)^2 / (2 * sigma^2))`, a wrong one 0.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each completion.
        correct (`torch.BoolTensor` of shape `(B,)`):
            Whether the answer is right.
        targets (`torch.Tensor` of shape `(B,)`):
            Tokens that the thought's opening states.
        weight (`float`, *optional*, defaults to `0.8`):
            Most that length earns.
        sigma (`float`, *optional*, defaults to `120`):
            Tokens.

    Returns:
        `torch.Tensor` of shape `(B,)`: rewards between 0 and `1 + weight`, the correctness included.
    """
    tokens, right, wanted = _floats(lengths, correct, targets)
    return right * (1 + weight * torch.exp(-(tokens - wanted).square() / (2 * sigma**2)))
