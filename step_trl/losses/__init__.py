"""Losses other than GRPO's, as functions of log-probabilities, and a way to train with them in TRL."""

from .as_advantages import check_loss_options, loss_as_advantages
from .negative_aware import correct_rates, nft_loss, nft_statistics
from .probability_mask import uncertain_tokens
from .ratio_limits import within_ratio_limits
from .reshaped import reshaped_policy_loss


__all__ = [
    "check_loss_options",
    "correct_rates",
    "loss_as_advantages",
    "nft_loss",
    "nft_statistics",
    "reshaped_policy_loss",
    "uncertain_tokens",
    "within_ratio_limits",
]
