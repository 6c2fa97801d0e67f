"""DLER's advantages before the loss, against the numbers of its specification."""

import pytest
import torch

from step_trl.advantages import centred_rewards, moments, whiten


def test_worked_numbers():
    centred, has_signal = centred_rewards(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), 4)
    assert centred.tolist() == [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75] and has_signal.all()
    whitened = whiten(centred, moments(centred, torch.ones(8)))
    assert whitened[:2].tolist() == pytest.approx([1.6201851368, -0.5400617123])


@pytest.mark.parametrize("tokens", [1, 3, 10])
def test_the_variance_is_over_tokens(tokens):
    centred, _ = centred_rewards(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]), 4)
    each = centred[:, None].expand(8, tokens)
    scale = (0.1875 * 8 * tokens / (8 * tokens - 1)) ** -0.5
    torch.testing.assert_close(whiten(each, moments(each, torch.ones(8, tokens))), each * scale)


def test_equal_rewards_have_no_signal():
    centred, has_signal = centred_rewards(torch.tensor([0.1, 0.1, 0.1, 1, 0, 1]), 3)
    assert has_signal.tolist() == [False] * 3 + [True] * 3
    assert centred[:3].abs().max() < 1e-8
