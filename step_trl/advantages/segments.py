"""Advantages of SPO (arXiv 2505.23564): each segment is credited with the change of the value that it brings."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def segment_boundaries(probabilities: torch.Tensor, threshold: float = 0.9, interval: int = 5) -> list[int]:
    """
    Cut a completion before some of its uncertain tokens (SPO-chain, section 4.1).

    Args:
        probabilities (`torch.Tensor` of shape `(T,)`):
            The probability of each token under the policy that sampled it, at the sampling temperature.
        threshold (`float`, *optional*, defaults to `0.9`):
            A token with a lower probability is uncertain.
        interval (`int`, *optional*, defaults to `5`):
            The number k: a cut is made before the first uncertain token and each k-th one after it.

    Returns:
        `list[int]`: For each cut, the index of the token before it, in ascending order; -1 is the end of the prompt.

    Example:
    ```python
    >>> segment_boundaries(torch.tensor([0.4, 0.95, 0.7, 0.93, 0.99]), interval=1)
    [-1, 1]
    ```
    """
    if interval < 1:
        raise ValueError(f"interval: {interval} is not a number of tokens. Set at least 1.")
    uncertain = (probabilities < threshold).nonzero().flatten()
    return (uncertain[::interval] - 1).tolist()


def thin_boundaries(boundaries: Sequence[int], most: int | None) -> list[int]:
    """
    Keep at most `most` boundaries, evenly spread, among them the first; all of them with `None`.

    The paper has no such limit. It bounds the cost of a completion, and merges neighbouring segments.
    """
    if most is None or len(boundaries) <= most:
        return list(boundaries)
    return [boundaries[place * len(boundaries) // most] for place in range(most)]


def segment_advantages(
    length: int,
    boundaries: Sequence[int],
    values: Sequence[float],
    reward: float,
    prompt_value: float | None = None,
) -> torch.Tensor:
    """
    Return the advantage of each token: the value at the end of its segment minus that at its start (SPO, eq. 5).

    The last segment ends in the reward. Without the value of the prompt, the tokens before the first boundary have no
    base, and their advantage is 0. A completion without boundaries has advantage 0 everywhere.

    Args:
        length (`int`):
            The number of tokens T.
        boundaries (`Sequence[int]`):
            The last token of each segment but the last one, as from [`segment_boundaries`].
        values (`Sequence[float]`):
            The value at each boundary: the mean reward of completions sampled from there.
        reward (`float`):
            The reward of the completion, which is the value at its end.
        prompt_value (`float`, *optional*):
            The value of the prompt. It is not needed if the first boundary is -1.

    Returns:
        `torch.Tensor` of shape `(T,)`: The advantages, before mask and whitening.

    Example:
    ```python
    >>> segment_advantages(5, [-1, 1], [0.5, 0.25], reward=1.0).tolist()
    [-0.25, -0.25, 0.75, 0.75, 0.75]
    ```
    """
    if len(boundaries) != len(values):
        raise ValueError(f"values: {len(values)} values for {len(boundaries)} boundaries. Pass one for each.")
    advantages = torch.zeros(length)
    if not boundaries:
        return advantages
    start, base = 0, prompt_value
    for boundary, value in zip([*boundaries, length - 1], [*values, reward], strict=True):
        if base is not None:
            advantages[start : boundary + 1] = value - base
        start, base = boundary + 1, value
    return advantages


def moments(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the number, the sum and the sum of squares `(3,)` of masked values. Those of processes can be added."""
    chosen = values[mask.bool()].double()
    return torch.stack([chosen.new_tensor(len(chosen)), chosen.sum(), chosen.square().sum()])


def whiten(values: torch.Tensor, moments: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """
    Shift and scale values to mean 0 and variance 1.

    Args:
        values (`torch.Tensor`):
            The values, of any shape.
        moments (`torch.Tensor` of shape `(3,)`):
            The [`moments`] of the values that count, over all processes. The variance is the unbiased one. With fewer
            than two values, there is nothing to scale by, and all values become 0.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the variance.
    """
    number, total, squares = moments.tolist()
    if number < 2:
        return torch.zeros_like(values)
    mean = total / number
    variance = max(squares - total * mean, 0.0) / (number - 1)
    return (values - mean) * (variance + eps) ** -0.5
