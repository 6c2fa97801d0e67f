"""What a length reward, chosen by its name, adds to the correctness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class LengthReward:
    """A length reward, and what it is called with."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[str, ...]  # the arguments of `length_term` that it takes
    options: tuple[str, ...] = ()  # its other arguments, which `length_reward_options` sets
    includes_correctness: bool = True  # whether its value is the correctness and more, not only what is added to it


_GROUP = ("lengths", "correct", "num_generations")
_TARGET = ("lengths", "correct", "targets")
LENGTH_REWARDS: dict[str, LengthReward] = {
    "kimi": LengthReward(kimi_length_reward, _GROUP, includes_correctness=False),
    "soft_overlong": LengthReward(
        soft_overlong_reward, ("lengths", "max_completion_length"), ("soft_punish_cache",), includes_correctness=False
    ),
    "grpo_lambda": LengthReward(grpo_lambda_reward, _GROUP, ("top_ratio", "alpha")),
    "train_efficiently": LengthReward(train_efficiently_reward, (*_GROUP, "ended"), ("alpha",)),
    "l1_exact": LengthReward(l1_exact_reward, _TARGET, ("alpha",)),
    "l1_max": LengthReward(l1_max_reward, _TARGET, ("alpha", "delta")),
    "lapo_discovery": LengthReward(lapo_discovery_reward, _GROUP, ("weight", "low", "high", "decay")),
    "lapo_internalization": LengthReward(lapo_internalization_reward, _TARGET, ("weight", "sigma")),
    "s_grpo": LengthReward(s_grpo_reward, ("correct", "num_generations"), ("decay",)),
}
TARGETS_IN_ROWS = ("l1_exact", "l1_max")  # LAPO's targets are measured
# Rewards that make no sense without their own trainer.
OF_A_TRAINER = {
    "lapo_discovery": "LAPOTrainer (trainer: lapo) with lapo_stage='discovery'",
    "lapo_internalization": "LAPOTrainer (trainer: lapo) with lapo_stage='internalization'",
    "s_grpo": "SGRPOTrainer (trainer: s_grpo)",
}


def check_length_reward(name: str, options: Mapping[str, Any], own: tuple[str, ...] = ()) -> None:
    """
    Refuse an unknown length reward, another trainer's, or options that it does not have.

    `own` are the keys of `OF_A_TRAINER` that the trainer at hand has.
    """
    if name in OF_A_TRAINER and name not in own:
        raise ValueError(f"length_reward: {name!r} has a trainer of its own. Use {OF_A_TRAINER[name]}.")
    if name not in LENGTH_REWARDS:
        names = ", ".join(key for key in LENGTH_REWARDS if key not in OF_A_TRAINER or key in own)
        raise ValueError(f"length_reward: {name!r} is not known. Set one of {names}.")
    known = LENGTH_REWARDS[name].options
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"length_reward_options: {name!r} has no {', '.join(unknown)}. Set {', '.join(known)}.")


def length_term(
    name: str,
    options: Mapping[str, Any],
    *,
    correct: torch.Tensor,
    **others: torch.Tensor | int,
) -> torch.Tensor:
    """
    Return a length reward `(B,)` without the correctness, which is in another column of the rewards.

    The others are `num_generations`, `max_completion_length`, and tensors of the shape of `correct`, `(B,)`: the
    `lengths` of the completions of the global batch, whether they `ended` with EOS, and the `targets` that prompts ask
    for (any number where they do not).
    """
    inputs = {"correct": correct, **others}
    reward = LENGTH_REWARDS[name]
    rewards = reward.function(**{key: inputs[key] for key in reward.inputs}, **options)
    return rewards - correct.to(rewards.dtype) if reward.includes_correctness else rewards
