"""Losses other than GRPO's, as functions of log-probabilities, and a way to train with them in TRL."""

from .as_advantages import check_loss_options, loss_as_advantages
from .negative_aware import correct_rates, nft_loss, nft_statistics
from .probability_mask import uncertain_tokens


__all__ = [
    "check_loss_options",
    "correct_rates",
    "loss_as_advantages",
    "nft_loss",
    "nft_statistics",
    "uncertain_tokens",
]
