"""The papers' metrics: Pass@1, compression rate and the accuracy-efficiency score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """
    Compute the mean over problems of the share of correct samples, between 0 and 1.

    `correct` has one sequence per problem, with one value per sample.
    """
    if not correct or not all(len(samples) for samples in correct):
        raise ValueError("correct: there are no problems, or one has no samples. Pass at least one sample each.")
    return fmean(fmean(map(float, samples)) for samples in correct)


def compression_rate(tokens: Mapping[str, float], vanilla_tokens: Mapping[str, float]) -> float:
    """
    Compute the mean over tasks of the tokens relative to the vanilla model (Step-GRPO, eq. 8), 1.0 for equal lengths.

    Both arguments are the mean number of tokens per completion of each task, and have the same tasks.
    """
    if not tokens or tokens.keys() != vanilla_tokens.keys():
        raise ValueError(
            f"tokens, vanilla_tokens: the tasks {sorted(tokens)} and {sorted(vanilla_tokens)} differ or are empty. "
            "Pass the same tasks for both models."
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
    Compute SAS's accuracy-efficiency score (AES): tokens saved, plus accuracy gained or minus accuracy lost.

    With dL = (base_tokens - tokens) / base_tokens and dA = (accuracy - base_accuracy) / base_accuracy, the score is
    alpha * dL + beta * dA if dA >= 0, else alpha * dL - gamma * |dA|.

    Args:
        accuracy (`float`), base_accuracy (`float`):
            The accuracies of the model and of the baseline, in the same unit.
        tokens (`float`), base_tokens (`float`):
            The mean numbers of tokens per completion of the model and of the baseline.
        alpha (`float`), beta (`float`), gamma (`float`):
            The weights of length, of gained accuracy and of lost accuracy.

    Returns:
        `float`: The score, 0 for no change; higher is better.
    """
    if base_accuracy <= 0 or base_tokens <= 0:
        raise ValueError(
            f"base_accuracy, base_tokens: {base_accuracy} and {base_tokens} must be positive, because changes are "
            "relative to them."
        )
    saved = (base_tokens - tokens) / base_tokens
    gained = (accuracy - base_accuracy) / base_accuracy
    return alpha * saved + (beta if gained >= 0 else gamma) * gained
