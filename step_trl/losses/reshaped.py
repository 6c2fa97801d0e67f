"""The loss of Critique-GRPO on refinements, which another prompt has led to (arXiv 2506.03106)."""

from __future__ import annotations

import torch


def reshaped_policy_loss(logps: torch.Tensor, advantages: torch.Tensor, gamma: float = 0.1) -> torch.Tensor:
    """
    Compute the policy loss of tokens that the policy has not sampled from this prompt.

    With p for the probability of a token, the loss is `-A * p / (p + gamma)`. There is no ratio, since there is no
    probability under a policy that sampled it. The gradient with respect to a log-probability is
    `-A * gamma * p / (p + gamma)**2`, which is largest at `p = gamma`: unlikely tokens count more than with plain
    likelihood ratios, and very unlikely ones less.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`):
            The log-probability of each token under the policy.
        advantages (`torch.Tensor` of shape `(B,)`):
            The advantage of each completion.
        gamma (`float`, *optional*, defaults to `0.1`):
            The shape, positive.

    Returns:
        `torch.Tensor` of shape `(B, T)`
    """
    if not gamma > 0:
        raise ValueError(f"gamma: {gamma} is not positive. Set the paper's 0.1.")
    probabilities = logps.exp()
    return -advantages[:, None] * probabilities / (probabilities + gamma)
