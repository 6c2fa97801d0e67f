"""Reshape the tensors of a batch into whole groups, for rewards that are relative to a group."""

from __future__ import annotations

import torch


def whole_groups(name: str, values: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Return the values `(B,)` of completions as `(B / G, G)`; groups of G = `num_generations` follow each other.

    Raises:
        `ValueError`: If the completions are not whole groups. The error message calls the values `name`.
    """
    if len(values) % num_generations:
        raise ValueError(
            f"{name}: {len(values)} completions are not whole groups of num_generations={num_generations}. "
            "Pass all completions of each group, gathered from all processes."
        )
    return values.view(-1, num_generations)


def by_group(
    name: str, values: torch.Tensor, correct: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values, at least float32, and the correctness, each `(B / G, G)`, see [`whole_groups`]."""
    groups = whole_groups(name, values, num_generations)
    groups = groups.to(torch.promote_types(groups.dtype, torch.float32))
    return groups, correct.bool().view(-1, num_generations)
