"""Advantages of steps by how their potential, which is confidence weighed by correctness, changes (SPAE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


_ROUNDING = 1e-6  # what differs by less would be stretched to the range from 0 to 1


def step_potential(
    accuracy: torch.Tensor, confidence: torch.Tensor, weights: Sequence[float] = (1.5, 0.5, 1.0)
) -> torch.Tensor:
    """
    Return the potential of steps: `a * accuracy * confidence + b * accuracy - c * confidence`.

    With the default weights it is 1 for a certain right answer, -1 for a certain wrong one, and 0 for no idea.

    Args:
        accuracy (`torch.Tensor`), confidence (`torch.Tensor` of the same shape):
            How probable the right answer is after each step, and how certain the policy is of its own, both 0 to 1.
        weights (`Sequence[float]`, *optional*, defaults to `(1.5, 0.5, 1.0)`):
            a, b and c.

    Returns:
        `torch.Tensor` of the same shape
    """
    of_both, of_accuracy, of_confidence = weights
    return of_both * accuracy * confidence + of_accuracy * accuracy - of_confidence * confidence


def saturation_factors(potentials: torch.Tensor, threshold: float = 0.9, penalty: float = 0.5) -> torch.Tensor:
    """
    Return the factor f on the advantage of each step: `1 - penalty * (1 - exp(-C))`.

    C is the number of earlier steps whose potential is above the threshold, after which thinking on was needless.

    Args:
        potentials (`torch.Tensor` of shape `(B, S)`):
            The [`step_potential`] of each completion's steps, NaN from its last one on.
        threshold (`float`, *optional*, defaults to `0.9`):
            The potential above which a step is saturated.
        penalty (`float`, *optional*, defaults to `0.5`):
            The share of the advantage that many saturated steps take away.

    Returns:
        `torch.Tensor` of shape `(B, S + 1)`: The last column of a completion is for what follows its last step.
    """
    earlier = torch.nn.functional.pad((potentials > threshold).to(potentials).cumsum(dim=1), (1, 0))
    return 1 - penalty * (1 - (-earlier).exp())


def potential_bonuses(potentials: torch.Tensor) -> torch.Tensor:
    """
    Return the bonus g of each step: `exp(minmax(change in potential))`, less its mean.

    Smallest, largest and mean are those of all changes in the batch. The first step has no change, and no bonus; nor
    has what follows the last step.

    Args:
        potentials (`torch.Tensor` of shape `(B, S)`):
            The [`step_potential`] of each completion's steps, NaN from its last one on. Of all processes.

    Returns:
        `torch.Tensor` of shape `(B, S + 1)`: The bonuses, which add up to 0. They are 0 if all changes are equal, but
        for rounding.
    """
    changes = potentials.diff(dim=1)
    known = changes[~changes.isnan()]
    bonuses = potentials.new_zeros(potentials.size(0), potentials.size(1) + 1)
    if not len(known) or known.max() - known.min() < _ROUNDING:
        return bonuses
    scaled = ((changes - known.min()) / (known.max() - known.min())).exp()
    bonuses[:, 1:-1] = (scaled - scaled.nanmean()).nan_to_num(nan=0.0)
    return bonuses


def steps_at_cuts(cuts: Sequence[int], thought: int, length: int) -> torch.Tensor:
    """
    Return the step `(T,)` of each token of a completion, and -1 for those of its answer.

    Args:
        cuts (`Sequence[int]`):
            The number of tokens up to the end of each step, in ascending order.
        thought (`int`), length (`int`):
            The number of tokens of the thought, which comes first, and of the completion, T.
    """
    places = torch.arange(length)
    steps = torch.searchsorted(torch.tensor(list(cuts), dtype=torch.long), places, right=True)
    return steps.masked_fill(places >= thought, -1)


def credit_steps(
    advantages: torch.Tensor, step_ids: torch.Tensor, factors: torch.Tensor, bonuses: torch.Tensor, weight: float = 0.5
) -> torch.Tensor:
    """
    Return the advantage of each token: that of its completion times its step's factor, plus its step's bonus.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`):
            The advantages of the group.
        step_ids (`torch.LongTensor` of shape `(B, T)`):
            The step of each token, as from [`steps_at_cuts`]. Tokens with -1 keep the advantage of the group.
        factors (`torch.Tensor` of shape `(B, S + 1)`), bonuses (`torch.Tensor` of shape `(B, S + 1)`):
            As from [`saturation_factors`] and [`potential_bonuses`].
        weight (`float`, *optional*, defaults to `0.5`):
            The weight of the bonuses.

    Returns:
        `torch.Tensor` of shape `(B, T)`: Before the global standardisation.
    """
    steps, of_group = step_ids.clamp(min=0), advantages[:, None]
    credited = of_group * factors.gather(1, steps) + weight * bonuses.gather(1, steps)
    return torch.where(step_ids < 0, of_group, credited)
