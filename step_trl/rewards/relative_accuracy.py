"""Mean relative accuracy: how close a number is to the right one (VerIPO, arXiv 2505.19000)."""

from __future__ import annotations

import numpy as np


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
