"""What a length reward, chosen by its name, adds to the correctness."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .budget import l1_exact_reward, l1_max_reward, lapo_internalization_reward, soft_overlong_reward
from .length import (
    grpo_lambda_reward,
    kimi_length_reward,
    lapo_discovery_reward,
    s_grpo_reward,
    train_efficiently_reward,
)


LENGTH_REWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "kimi": kimi_length_reward,
    "soft_overlong": soft_overlong_reward,
    "grpo_lambda": grpo_lambda_reward,
    "train_efficiently": train_efficiently_reward,
    "l1_exact": l1_exact_reward,
    "l1_max": l1_max_reward,
    "lapo_discovery": lapo_discovery_reward,
    "lapo_internalization": lapo_internalization_reward,
    "s_grpo": s_grpo_reward,
}
WITH_TARGETS = ("l1_exact", "l1_max", "lapo_internalization")
TARGETS_IN_ROWS = WITH_TARGETS[:2]  # LAPO's are measured


def check_length_reward(name: str, options: Mapping[str, Any]) -> None:
    """
    Refuse an unknown length reward, or options that it does not have.

    Args:
        name (`str`):
            A key of `LENGTH_REWARDS`.
        options (`Mapping[str, Any]`):
            Of that function.
    """
    if name not in LENGTH_REWARDS:
        raise ValueError(f"length_reward: {name!r} is not known. Set one of {', '.join(LENGTH_REWARDS)}.")
    parameters = inspect.signature(LENGTH_REWARDS[name]).parameters.values()
    known = [p.name for p in parameters if p.default is not p.empty and p.name != "ended"]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"length_reward_options: {name!r} has no {', '.join(unknown)}. Set {', '.join(known)}.")


def length_term(
    name: str,
    lengths: torch.Tensor,
    correct: torch.Tensor,
    num_generations: int,
    ended: torch.Tensor,
    targets: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """
    A length reward without the correctness, which is in another column of the rewards.

    Args:
        name (`str`):
            A key of `LENGTH_REWARDS`.
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each completion of the global batch; groups of `num_generations` follow each other.
        correct (`torch.BoolTensor` of shape `(B,)`):
            Whether the answer is right.
        num_generations (`int`):
            Completions per group.
        ended (`torch.BoolTensor` of shape `(B,)`):
            Whether the completion ended with the EOS token.
        targets (`torch.Tensor` of shape `(B,)`):
            Tokens that the prompts ask for; only looked at by the rewards of `WITH_TARGETS`.
        **options:
            Of the function.

    Returns:
        `torch.Tensor` of shape `(B,)`: the first two are terms already; of the others the correctness is taken away.
    """
    if name == "kimi":
        return kimi_length_reward(lengths, correct, num_generations, **options)
    if name == "soft_overlong":
        return soft_overlong_reward(lengths, **options)
    if name == "s_grpo":
        rewards = s_grpo_reward(correct, num_generations, **options)
    elif name in WITH_TARGETS:
        rewards = LENGTH_REWARDS[name](lengths, correct, targets, **options)
    elif name == "train_efficiently":
        rewards = train_efficiently_reward(lengths, correct, num_generations, ended, **options)
    else:
        rewards = LENGTH_REWARDS[name](lengths, correct, num_generations, **options)
    return rewards - correct.to(rewards.dtype)
