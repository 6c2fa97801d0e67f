"""The probability mask of SPO (arXiv 2505.23564), which any method can train with: certain tokens leave the loss."""

from __future__ import annotations

import math

import torch


def uncertain_tokens(logps: torch.Tensor, threshold: float = 0.9) -> torch.Tensor:
    """
    Tokens that the policy was not certain of, which are those to train on.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token under the policy that sampled it, at the sampling temperature.
        threshold (`float`, *optional*, defaults to `0.9`):
            Probability from which on a token is certain; between 0 and 1. One that has it exactly is certain.

    Returns:
        `torch.BoolTensor` of shape `(B, T)`: whether the probability is below the threshold; false where it is NaN.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: {threshold} is not between 0 and 1. Set a probability, for example 0.9.")
    return logps < math.log(threshold)
