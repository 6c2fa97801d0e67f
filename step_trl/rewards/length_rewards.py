"""What a length reward, chosen by its name, adds to the correctness."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .length import (
    grpo_lambda_reward,
    kimi_length_reward,
    lapo_discovery_reward,
    s_grpo_reward,
    train_efficiently_reward,
)
from .target_length import l1_exact_reward, l1_max_reward, lapo_internalization_reward, soft_overlong_reward


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
TERMS = ("kimi", "soft_overlong")  # the others include the correctness
TARGETS_IN_ROWS = ("l1_exact", "l1_max")  # LAPO's are measured


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
    options: Mapping[str, Any],
    *,
    lengths: torch.Tensor,
    correct: torch.Tensor,
    num_generations: int,
    ended: torch.Tensor,
    targets: torch.Tensor,
    max_completion_length: int,
) -> torch.Tensor:
    """
    A length reward without the correctness, which is in another column of the rewards.

    Args:
        name (`str`):
            A key of `LENGTH_REWARDS`. The function is given those of what follows that it has a parameter for.
        options (`Mapping[str, Any]`):
            Of the function.
        lengths (`torch.Tensor` of shape `(B,)`):
            Tokens of each completion of the global batch; groups of `num_generations` follow each other.
        correct (`torch.BoolTensor` of shape `(B,)`):
            Whether the answer is right.
        num_generations (`int`):
            Completions per group.
        ended (`torch.BoolTensor` of shape `(B,)`):
            Whether the completion ended with the EOS token.
        targets (`torch.Tensor` of shape `(B,)`):
            Tokens that the prompts ask for; anything where they do not.
        max_completion_length (`int`):
            Budget of a completion.

    Returns:
        `torch.Tensor` of shape `(B,)`
    """
    known = {
        "lengths": lengths,
        "correct": correct,
        "num_generations": num_generations,
        "ended": ended,
        "targets": targets,
        "max_completion_length": max_completion_length,
    }
    function = LENGTH_REWARDS[name]
    parameters = inspect.signature(function).parameters
    rewards = function(**{key: value for key, value in known.items() if key in parameters}, **options)
    return rewards if name in TERMS else rewards - correct.to(rewards.dtype)
