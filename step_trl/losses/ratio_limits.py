"""How SPO (arXiv 2505.23564) keeps tokens and micro-batches out whose policy has moved too far."""

from __future__ import annotations

import torch


def within_ratio_limits(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    mask: torch.Tensor,
    max_mean_ratio: float = 10.0,
    max_log_ratio: float = 10.0,
) -> torch.Tensor:
    """
    Mark the tokens that may still be trained on.

    SPO skips a micro-batch whose mean likelihood ratio is too large. It also clamps the logarithm of each ratio, and a
    clamped ratio has no gradient.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`), old_logps (`torch.Tensor` of shape `(B, T)`):
            The log-probability of each token under the policy, and under the policy that sampled.
        mask (`torch.Tensor` of shape `(B, T)`):
            1 for the tokens in the loss.
        max_mean_ratio (`float`, *optional*, defaults to `10.0`):
            The largest mean ratio of a micro-batch that is trained on.
        max_log_ratio (`float`, *optional*, defaults to `10.0`):
            The largest absolute log-ratio of a token that is trained on.

    Returns:
        `torch.BoolTensor` of shape `(B, T)`
    """
    log_ratio = logps - old_logps
    ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio).exp()
    chosen = ratio[mask.bool()]
    too_far = bool(len(chosen)) and chosen.mean().item() > max_mean_ratio
    return torch.zeros_like(mask, dtype=torch.bool) if too_far else log_ratio.abs() <= max_log_ratio
