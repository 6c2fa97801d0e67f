"""The papers' metrics: Pass@1, compression rate and the accuracy-efficiency score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """
    Mean over problems of the share of correct samples.

    Args:
        correct (`Sequence[Sequence[bool]]`):
            One sequence per problem, one value per sample.

    Returns:
        `float`: in 0..1.
    """
    if not correct or not all(len(samples) for samples in correct):
        raise ValueError("correct: there is a problem without samples, or none at all. Give at least one sample each.")
    return fmean(fmean(map(float, samples)) for samples in correct)


def compression_rate(tokens: Mapping[str, float], vanilla_tokens: Mapping[str, float]) -> float:
    """
    Mean over tasks of the tokens used relative to the vanilla model (Step-GRPO, eq. 8); lower is shorter.

    Args:
        tokens (`Mapping[str, float]`):
            Mean tokens per completion of each task.
        vanilla_tokens (`Mapping[str, float]`):
            The same of the vanilla model, for the same tasks.

    Returns:
        `float`: 1.0 for equal lengths.
    """
    if not tokens or tokens.keys() != vanilla_tokens.keys():
        raise ValueError(
            f"tokens, vanilla_tokens: the tasks {sorted(tokens)} and {sorted(vanilla_tokens)} differ or are none. "
            "Give the same tasks for both models."
        )
    return fmean(tokens[task] / vanilla_tokens[task] for task in tokens)


def accuracy_efficiency_score(
    accuracy: float,
    tokens: float,
    base_accuracy: float,
    base_tokens: float,
    alpha: float = 1,
    beta: float = 3,
    gamma: float = 5,
) -> float:
    """
    Accuracy-efficiency score (AES) as SAS uses it: tokens saved, plus accuracy gained or less accuracy lost.

    With dL = (base_tokens - tokens) / base_tokens and dA = (accuracy - base_accuracy) / base_accuracy, the score is
    alpha * dL + beta * dA if dA >= 0, else alpha * dL - gamma * |dA|.

    Args:
        accuracy (`float`), base_accuracy (`float`):
            Of the model and of the one it is compared with, in any one unit.
        tokens (`float`), base_tokens (`float`):
            Mean tokens per completion.
        alpha (`float`), beta (`float`), gamma (`float`):
            Weights of length, of gained and of lost accuracy.

    Returns:
        `float`: 0 for no change, higher is better.
    """
    if base_accuracy <= 0 or base_tokens <= 0:
        raise ValueError(
            f"base_accuracy, base_tokens: {base_accuracy} and {base_tokens} must be positive, changes are relative to "
            "them."
        )
    saved = (base_tokens - tokens) / base_tokens
    gained = (accuracy - base_accuracy) / base_accuracy
    return alpha * saved + (beta if gained >= 0 else gamma) * gained
