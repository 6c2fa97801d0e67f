"""Rewards that are relative to a group need whole groups."""

from __future__ import annotations

import torch


def whole_groups(name: str, values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Values `(B,)` of completions as `(B / G, G)`; groups of G = `num_generations` follow each other.

    Raises:
        `ValueError`: these are no whole groups. The error calls the values `name`.
    """
    if len(values) % num_generations:
        raise ValueError(
            f"{name}: {len(values)} completions are no whole number of groups of num_generations={num_generations}. "
            "Call after the gather, with all completions of each group."
        )
    return values.view(-1, num_generations)


def by_group(
    name: str, values: torch.Tensor, correct: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Values, as floats, and correctness, each `(B / G, G)`.

    Args:
        name (`str`):
            What an error calls the values.
        values (`torch.Tensor` of shape `(B,)`), correct (`torch.Tensor` of shape `(B,)`):
            Of completions; groups of `num_generations` follow each other.
        num_generations (`int`):
            G, completions per group.

    Raises:
        `ValueError`: these are no whole groups.
    """
    groups = whole_groups(name, values, num_generations)
    groups = groups.to(torch.promote_types(groups.dtype, torch.float32))
    return groups, correct.bool().view(-1, num_generations)
