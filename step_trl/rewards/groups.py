"""Reshape the tensors of a batch into whole groups, for rewards that are relative to a group."""

from __future__ import annotations

import torch


def by_group(
    name: str, values: torch.Tensor, correct: torch.Tensor, num_generations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the values, as floats, and the correctness, each `(B / G, G)`.

    Args:
        name (`str`):
            The name of the values in error messages.
        values (`torch.Tensor` of shape `(B,)`), correct (`torch.Tensor` of shape `(B,)`):
            The values and the correctness of each completion, ordered in groups of `num_generations`.
        num_generations (`int`):
            The number G of completions per group.

    Raises:
        `ValueError`: If the completions are not whole groups.
    """
    if len(values) % num_generations:
        raise ValueError(
            f"{name}: {len(values)} completions are not whole groups of num_generations={num_generations}. "
            "Pass all completions of each group, gathered from all processes."
        )
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.view(-1, num_generations), correct.bool().view(-1, num_generations)
