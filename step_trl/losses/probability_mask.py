"""The probability mask of SPO (arXiv 2505.23564), for any method: certain tokens are left out of the loss."""

from __future__ import annotations

import math

import torch


def uncertain_tokens(logps: torch.Tensor, threshold: float = 0.9) -> torch.Tensor:
    """
    Mark the tokens that the policy was not certain of, which are the ones to train on.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            The log-probability of each token under the policy that sampled it, at the sampling temperature.
        threshold (`float`, *optional*, defaults to `0.9`):
            The probability, between 0 and 1, from which on a token is certain. A token with exactly this probability
            is certain.

    Returns:
        `torch.BoolTensor` of shape `(B, T)`: Whether the probability is below the threshold. False where it is NaN.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: {threshold} is not between 0 and 1. Set a probability, for example 0.9.")
    return logps < math.log(threshold)
