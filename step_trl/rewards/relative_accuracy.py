"""Mean relative accuracy: how close a number is to the right one (VerIPO, arXiv 2505.19000)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..text import completion_text
from .correctness import block_text, extract_answers


THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())  # as in the released code


def mean_relative_accuracy(predicted: float, gold: float, *, strict_float: bool = False) -> float:
    """
    Return the share of ten tolerances, 50 % to 5 %, within which a number is close to the right one.

    Tolerances are relative to the absolute value of `gold`, and an error at a tolerance is within it. If `gold` is 0,
    the score is 1 for 0, and 0 otherwise.

    Args:
        predicted (`float`), gold (`float`):
            The number, and the right one.
        strict_float (`bool`, *optional*, defaults to `False`):
            Compute as the released code does: relative to `gold` itself, so that a negative one is always reached, and
            without allowing for rounding. A `gold` of 0 is an error.
    """
    if strict_float:
        error, tolerance = abs(predicted - gold) / gold, 0.0
    elif gold == 0:
        return float(predicted == 0)
    else:
        error, tolerance = abs(predicted - gold) / abs(gold), 1e-9
    return sum(error <= 1 - threshold + tolerance for threshold in THRESHOLDS) / len(THRESHOLDS)


def relative_accuracy_reward(
    completions: list[str] | list[list[dict]], solution: list[str], **kwargs
) -> list[float | None]:
    """
    Return the [`mean_relative_accuracy`] of answers that are numbers, for questions about estimates.

    The answer is the last `<answer>` block after the thought, or else what math-verify reads. An answer that is no
    number scores 0.0; a solution that is none, `None`. `kwargs` are what else TRL passes to reward functions.
    """
    read = extract_answers([block_text(completion_text(completion)) for completion in completions])
    rewards: list[float | None] = []
    for answer, right in zip(read, solution, strict=True):
        predicted, gold = _number(answer), _number(right)
        reward = None if gold is None else 0.0 if predicted is None else mean_relative_accuracy(predicted, gold)
        rewards.append(reward)
    return rewards


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        return None
