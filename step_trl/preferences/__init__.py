"""Recorded rollouts, what is wrong with them, and pairs of them to prefer one to the other (VerIPO)."""

from .dpo import RolloutDPOTrainer, tokenize_pairs, visual_pairs
from .pairs import preference_pairs, summarize_verification
from .records import latest_groups, read_rollouts, thin_easy_prompts
from .verifier import RolloutVerifier, agree, repetition


__all__ = [
    "RolloutDPOTrainer",
    "RolloutVerifier",
    "agree",
    "latest_groups",
    "preference_pairs",
    "read_rollouts",
    "repetition",
    "summarize_verification",
    "thin_easy_prompts",
    "tokenize_pairs",
    "visual_pairs",
]
