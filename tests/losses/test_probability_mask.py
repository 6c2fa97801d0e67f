"""The probability mask by the numbers of SPO's rule."""

from __future__ import annotations

import math

import pytest
import torch

from step_trl.losses import uncertain_tokens


def certain(*probabilities, dtype=torch.float64, **options):
    """Return which tokens are left out of the loss."""
    logps = torch.tensor([[math.log(value) for value in probabilities]], dtype=dtype)
    return (~uncertain_tokens(logps, **options)).nonzero()[:, 1].tolist()


def test_tokens_above_the_threshold_leave():
    assert certain(0.95, 0.5, 0.99, 0.8, 0.97, 0.6, 0.92, 0.99) == [0, 2, 4, 6, 7]
    assert certain(0.4, 0.95, 0.7, 0.93, 0.99) == [1, 3, 4]
    assert certain(0.4, 0.95, 0.7, 0.93, 0.99, threshold=0.5) == [1, 2, 3, 4]
    assert certain(0.95, 0.99) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_threshold_itself_leaves(dtype):
    assert certain(0.9, 0.89, dtype=dtype) == [0]


def test_shape_and_tokens_without_a_probability():
    logps = torch.tensor([[math.nan, -math.inf], [0.0, -1.0]])
    found = uncertain_tokens(logps)
    assert found.dtype == torch.bool
    assert found.tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("threshold", [0.0, 1.0, 90, math.nan])
def test_threshold_is_checked(threshold):
    with pytest.raises(ValueError, match=f"threshold: {threshold} .*0.9"):
        uncertain_tokens(torch.zeros(1, 1), threshold)
