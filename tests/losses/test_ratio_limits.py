"""Tokens and micro-batches that SPO leaves out because the policy has moved too far."""

import math

import torch

from step_trl.losses import within_ratio_limits


MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def kept(ratios, **options):
    logps = torch.tensor(ratios).log()
    return within_ratio_limits(logps, torch.zeros_like(logps), MASK, **options).tolist()


def test_a_micro_batch_is_kept_or_skipped_as_a_whole():
    ratios = [[10.0, 10.0, 1e3], [10.0, 10.0, 10.0]]  # the masked token does not count
    assert kept(ratios, max_mean_ratio=10.01) == [[True] * 3] * 2
    assert kept(ratios, max_mean_ratio=9.99) == [[False] * 3] * 2


def test_a_token_beyond_the_largest_log_ratio_is_left_out():
    far = math.exp(-10.5)
    assert kept([[1.0, far, 1.0], [1.0, 1.0, 1.0]]) == [[True, False, True], [True] * 3]
    # Its ratio counts as exp(10) in the mean: 22026 / 5 tokens is below 5,000, and exp(20) / 5 is not.
    assert kept([[1.0, math.exp(20), 1.0], [1.0, 1.0, 1.0]], max_mean_ratio=5000.0)[1] == [True] * 3


def test_nothing_in_the_loss():
    logps = torch.zeros(1, 2)
    assert within_ratio_limits(logps, logps, torch.zeros(1, 2)).all()
